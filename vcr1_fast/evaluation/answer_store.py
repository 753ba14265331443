"""Answers on disk while an evaluation runs, so that an interrupted one goes on where it stopped.

The folder holds `answers_of.json`, what all answers depend on (weights by content, sampling, video settings), and one
`answers-RANK.jsonl` for each process, a line with a checksum per answer, found again by what was asked: question text,
video file with its size and time of change. An answer to another question, or of other weights, is never taken.
Unreadable videos are not kept: they are tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vcr1_fast.evaluation.samples import Answer, write_lines
from vcr1_fast.learner.model import resolve_dtype
from vcr1_fast.learner.sharding import World, on_main_rank
from vcr1_fast.run.telemetry import to_json
from vcr1_fast.settings.config import Config, ConfigError, VideoConfig
from vcr1_fast.types import Example
from vcr1_fast.video.cache import IMAGE_FIELDS
from vcr1_fast.video.source_name import SourceName

MANIFEST = "answers_of.json"
VIDEO_FIELDS_WITHOUT_EFFECT = (
    *("reader", "timeout_s", "num_workers", "prefetch_steps", "clips_per_worker"),  # the reader has its own entry
    *("cache_dir", "cache_disk_gib", "cache_ram_gib"),
)


def answer_settings(
    config: Config, weights: str, reader: str, device: Any, prompts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What an answer depends on, apart from question and video; `prompts`: digests of prompt files by task."""
    video = {k: v for k, v in asdict(config.video).items() if k not in VIDEO_FIELDS_WITHOUT_EFFECT}
    usual = [name for name in IMAGE_FIELDS if video[name] == getattr(VideoConfig, name)]  # answers from before them
    video = {name: value for name, value in video.items() if name not in usual}
    rounds = {f"eval.{name}": getattr(config.eval, name) for name in ("perceptions", "perception")}
    return {
        "model.path": config.model.path,
        "weights": weights,
        "compute_dtype": str(resolve_dtype(config.model, device)).removeprefix("torch."),
        "engine": config.rollout.engine,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.eval.max_new_tokens or config.rollout.max_new_tokens,
        "repetition_penalty": config.eval.repetition_penalty,
        "seed": config.train.seed if config.eval.temperature > 0 else None,  # greedy answers do not depend on it
        "reader": reader,
        **{f"video.{name}": value for name, value in video.items()},
        **({"task.video_first": config.task.video_first} if config.task.video_first is not None else {}),
        **({"task.timestamps": config.task.timestamps} if config.task.timestamps != "positions" else {}),
        **(rounds if config.eval.perceptions > 1 else {}),
        **{f"task.prompts.{task}": digest for task, digest in (prompts or {}).items()},
    }


def question_key(question: str, example: Example) -> str:
    """Hex name of what is asked: the text, and each file shown by path (with what is to be seen of it), size and time
    of change."""
    shown: list[list[str | int]] = []
    for source in example.sources:
        try:
            stat = os.stat(SourceName.parse(source).path)
            shown.append([source, stat.st_size, stat.st_mtime_ns])
        except (OSError, ValueError):  # reading it will say why
            shown.append([source])
    return hashlib.sha256(json.dumps([question, *shown]).encode()).hexdigest()[:32]


class AnswerStore:
    """The answers of one evaluation. All ranks open it together; each appends to its own file.

    Example: `store.get(key)` is None until `store.put(key, answer)` was called, in this process or an earlier one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], world: World, *, restart: bool = False) -> None:
        """Makes the folder. `restart` drops what it holds; without it the answers there must be of equal `settings`.

        Raises ConfigError on every rank when they are of other settings, OSError when the folder cannot be written. On
        several machines the folder must be one that all of them see.
        """
        self.folder = folder
        found: list[dict[str, Answer]] = [{}]

        def prepare() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            if restart:
                for file in (*folder.glob("answers*.json*"), folder / "samples.jsonl", folder / "scores.json"):
                    file.unlink(missing_ok=True)
            _check_manifest(folder, settings)
            write_lines(folder / MANIFEST, [settings])
            found[0] = dict(_read_answers(folder))

        on_main_rank("opening the folder of the evaluation", prepare, world)
        if world.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        self._known = found[0]
        own = folder / f"answers-{world.rank}.jsonl"
        self._stream = own.open("a", encoding="utf-8")
        if own.stat().st_size:
            self._stream.write("\n")  # after a line that a kill has torn
        self.num_found = len(self._known)

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keeps an answer at once; failures are not kept."""
        if answer.failure:
            return
        self._known[key] = answer
        row = {"key": key, **asdict(answer)}
        self._stream.write(to_json(row | {"crc32": _checksum(row)}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _check_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    file = folder / MANIFEST
    if not file.is_file():
        if any(folder.glob("answers-*.jsonl")):
            raise ConfigError(f"{folder} holds answers without {MANIFEST}: set eval.restart=true to drop them")
        return
    try:
        there: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    now = json.loads(to_json(dict(settings)))
    if there == now:
        return
    if not isinstance(there, dict):
        raise ConfigError(f"{file} cannot be read: set eval.restart=true to drop the answers in that folder")
    changed = [
        f"{key} was {there.get(key)}, is {now.get(key)}" for key in {**there, **now} if there.get(key) != now.get(key)
    ]
    raise ConfigError(
        f"the answers in {folder} are of other settings ({'; '.join(changed)}): give this evaluation another "
        "eval.output_dir, or set eval.restart=true to drop them"
    )


def _read_answers(folder: Path) -> Iterator[tuple[str, Answer]]:
    """Whole lines of all ranks' files; what a kill has torn, or the disk has changed, is left out and asked again."""
    for file in sorted(folder.glob("answers-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                if row.pop("crc32") != _checksum(row):
                    continue
                answer = Answer(str(row["text"]), "", str(row["finish_reason"]), int(row["num_tokens"]))
                yield str(row["key"]), answer
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(to_json(row).encode())
