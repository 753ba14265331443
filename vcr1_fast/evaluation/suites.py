"""`vcr1-fast suite`: multiple-choice benchmarks in their public formats -> one JSONL file of our own rows.

    videomme         parquet or JSON rows of lmms-lab/Video-MME: videoID, question_id, question, options, answer,
                     duration (short, medium, long), domain, sub_category, task_type; or the JSON that the benchmark's
                     own script scores: one object per video, its questions in a list "questions"
    mvbench          one JSON list per task (action_sequence.json, ...) of OpenGVLab/MVBench: video, question,
                     candidates, answer (the text of one candidate)
    perception_test  google-deepmind/perception_test: JSON object video -> mc_question list of id, question, options,
                     answer_id, area, reasoning, tag; or the parquet of lmms-lab, one row per question

Each row gets "categories", an object of axis -> value or list of values (a question has several tags), by which
`vcr1-fast eval` makes further tables, and, where it is not the default one, "scoring": by which rule its letter is read
(tasks/benchmark_readers.py). The rows are of the task multiple_choice; bad ones are named and counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vcr1_fast.evaluation.samples import write_lines
from vcr1_fast.prompts.annotation_files import read_entries
from vcr1_fast.prompts.schemas.schema import read_field, read_text
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.tasks.multiple_choice import read_choice_row
from vcr1_fast.types import SampleError

Row = dict[str, object]
Rows = Iterator[tuple[str, "Row | ValueError"]]  # (where, row or why there is none)

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi")
NUM_ERRORS_SHOWN = 10
# Where MVBench's archives put the videos of each task. Tasks that ask about a part of a longer video have it cut out.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


@dataclass(frozen=True)
class SuiteRows:
    """What became of the files of a suite."""

    rows: list[Row]
    errors: list[SampleError]


def read_suite(
    suite: str, files: Sequence[str | Path], videos: str | Path | None = None, only: Mapping[str, str] | None = None
) -> SuiteRows:
    """Rows of all files. Video files are not opened.

    Args:
        videos: the folder of the videos, by default that of the first file.
        only: category axis -> wanted value, for example {"duration": "short"}.

    Raises ConfigError when a file cannot be read, is not of the suite, or nothing is left.
    """
    root = Path(videos) if videos is not None else Path(files[0]).parent
    rows: list[Row] = []
    errors: list[SampleError] = []
    where_of_id: dict[str, str] = {}
    for file in map(Path, files):
        for where, row in READERS[suite](file, root):
            source = f"{file}:{where}"
            if isinstance(row, ValueError):
                errors.append(SampleError(source, str(row)))
            elif (name := str(row["id"])) in where_of_id:
                errors.append(SampleError(source, f"id {name!r} is already taken by {where_of_id[name]}"))
            else:
                where_of_id[name] = source
                rows.append(row)
    for axis, value in (only or {}).items():
        known = sorted({known for row in rows for known in _values(row, axis)})
        if value not in known:
            raise ConfigError(f"no question has {axis}={value}; {axis} is one of: {', '.join(known) or 'nothing'}")
        rows = [row for row in rows if value in _values(row, axis)]
    if not rows:
        reason = f"; first error: {errors[0]}" if errors else ""
        raise ConfigError(f"no usable question of {suite} in {', '.join(map(str, files))}{reason}")
    return SuiteRows(rows, errors)


def _values(row: Row, axis: str) -> list[str]:
    categories = row["categories"]
    assert isinstance(categories, dict)
    found = categories.get(axis, [])
    return found if isinstance(found, list) else [found]


def _checked(where: str, make: Callable[[], Row]) -> tuple[str, Row | ValueError]:
    """The row, once the task multiple_choice would take it, or what is wrong with it."""
    try:
        row = make()
        read_choice_row(row, is_paper=False)
        return where, row
    except ValueError as error:
        return where, error


def _entries(file: Path, is_mapping: bool) -> Iterator[tuple[str, Any]]:
    """(where, object) of a file, or (where, ValueError). Raises ConfigError when it is a mapping and should be none."""
    entries = read_entries(file)
    if entries.is_mapping != is_mapping:
        wanted = "a JSON object of videos" if is_mapping else "a list of questions"
        raise ConfigError(f"{file} is not {wanted}: name another file or suite")
    for where, entry in entries.items:
        is_known = isinstance(entry, Mapping | ValueError)
        yield where, entry if is_known else ValueError(f"the row is a {type(entry).__name__}, wanted an object")


def _row(name: str, video: str, query: str, options: object, answer: object, categories: Mapping[str, object]) -> Row:
    row: Row = {"id": name, "task": "multiple_choice", "video": video, "query": query, "options": options}
    shown = {
        axis: list(map(str, value)) if isinstance(value, list) else str(value)
        for axis, value in categories.items()
        if value is not None and value != []
    }
    return row | {"answer": answer, "categories": shown}


def _video(root: Path, name: str) -> str:
    """Absolute path of the video called `name`, with or without its suffix; .mp4 where there is none yet."""
    path = os.path.abspath(os.path.expanduser(root / name))
    if os.path.splitext(name)[1] in VIDEO_SUFFIXES or os.path.exists(path):
        return path
    return path + next((suffix for suffix in VIDEO_SUFFIXES if os.path.exists(path + suffix)), ".mp4")


def _letter(index: object, num_options: int) -> str:
    """The letter of an option's number from 0, which some files write as text. Raises ValueError."""
    if not isinstance(index, bool) and str(index).isdecimal() and int(str(index)) < num_options:
        return ascii_uppercase[int(str(index))]
    raise ValueError(f"answer_id is {index!r:.60}, wanted 0 to {num_options - 1}")


def _options(entry: Mapping[str, object], key: str) -> list[object]:
    options = read_field(entry, key)
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"{key} is {options!r:.60}, wanted a list of 2 to {len(ascii_uppercase)} texts")
    return options


def _videomme(file: Path, root: Path) -> Rows:
    for where, entry in _entries(file, is_mapping=False):
        if isinstance(entry, ValueError):
            yield where, entry
        elif "questions" in entry:
            yield from _videomme_questions(where, entry, root)
        else:
            yield _checked(where, lambda e=entry: _videomme_row(e, root))


def _videomme_questions(where: str, video: Mapping[str, object], root: Path) -> Rows:
    """The rows of one video with a list of questions."""
    questions = video["questions"]
    if not isinstance(questions, list) or not questions:
        yield where, ValueError(f"questions is {questions!r:.60}, wanted a list of questions, at least one")
        return
    for number, question in enumerate(questions, start=1):
        if isinstance(question, Mapping):
            yield _checked(f"{where}:{number}", lambda q=question: _videomme_row({**video, **q}, root))
        else:
            yield f"{where}:{number}", ValueError(f"the question is a {type(question).__name__}, wanted an object")


def _videomme_name(entry: Mapping[str, object]) -> str:
    """The YouTube id, after which the video files are named; where only the address says it, the one there."""
    if "videoID" in entry or "url" not in entry:
        return read_text(entry, "videoID" if "videoID" in entry else "video_id")
    url = urlsplit(read_text(entry, "url"))
    return parse_qs(url.query).get("v", [url.path.rpartition("/")[2]])[0]


def _videomme_row(entry: Mapping[str, object], root: Path) -> Row:
    axes = ("duration", "domain", "sub_category", "task_type")
    return _row(
        f"videomme:{read_text(entry, 'question_id')}",
        _video(root, _videomme_name(entry)),
        read_text(entry, "question"),
        _options(entry, "options"),  # "A. Apples.", ...; the task takes the letters off
        read_field(entry, "answer"),
        {axis: read_text(entry, axis) for axis in axes},
    )


def _mvbench(file: Path, root: Path) -> Rows:
    task = file.stem
    if task not in MVBENCH_FOLDERS:
        raise ConfigError(
            f"{file} is not named after a task of MVBench, wanted one of {', '.join(MVBENCH_FOLDERS)}.json"
        )
    for where, entry in _entries(file, is_mapping=False):
        if isinstance(entry, ValueError):
            yield where, entry
        else:
            yield _checked(where, lambda w=where, e=entry: _mvbench_row(task, w, e, root))


def _mvbench_row(task: str, where: str, entry: Mapping[str, object], root: Path) -> Row:
    candidates, answer = _options(entry, "candidates"), read_text(entry, "answer")
    if candidates.count(answer) != 1:
        raise ValueError(f"answer is {answer!r:.60}, which is {candidates.count(answer)} times among the candidates")
    video = _video(root / MVBENCH_FOLDERS[task], read_text(entry, "video"))
    letter = ascii_uppercase[candidates.index(answer)]
    row = _row(f"mvbench:{task}:{where}", video, read_text(entry, "question"), candidates, letter, {"task": task})
    return row | {"scoring": "mvbench"}


def _perception_test(file: Path, root: Path) -> Rows:
    if file.suffix.lower() == ".parquet":
        for where, entry in _entries(file, is_mapping=False):
            if isinstance(entry, ValueError):
                yield where, entry
            else:
                yield _checked(
                    where, lambda e=entry: _perception_row(read_text(e, "video_name"), e, "question_id", root)
                )
        return
    for video, entry in _entries(file, is_mapping=True):
        questions = entry if isinstance(entry, ValueError) else entry.get("mc_question")
        if not isinstance(questions, list):
            reason = f"mc_question is {questions!r:.60}, wanted a list of questions"
            yield video, questions if isinstance(questions, ValueError) else ValueError(reason)
            continue
        for number, question in enumerate(questions, start=1):
            where = f"{video}:{number}"
            if isinstance(question, dict):
                yield _checked(where, lambda v=video, q=question: _perception_row(v, q, "id", root))
            else:
                yield where, ValueError(f"the question is a {type(question).__name__}, wanted an object")


def _perception_row(video: str, entry: Mapping[str, object], id_key: str, root: Path) -> Row:
    options = _options(entry, "options")
    row = _row(
        f"perception_test:{video}:{read_field(entry, id_key)}",
        _video(root, video),
        read_text(entry, "question"),
        options,
        _letter(read_field(entry, "answer_id"), len(options)),
        {axis: entry.get(axis) for axis in ("area", "reasoning", "tag")},
    )
    return row | {"scoring": "perception_test"}


READERS: dict[str, Callable[[Path, Path], Rows]] = {
    "videomme": _videomme,
    "mvbench": _mvbench,
    "perception_test": _perception_test,
}


def suite_command(
    suite: str, files: Sequence[str], output: str, videos: str | None, only: Mapping[str, str]
) -> dict[str, Any]:
    """Writes the rows to `output`, bad ones to stderr; returns the counts. Raises ConfigError or OSError."""
    found = read_suite(suite, files, videos, only)
    for error in found.errors[:NUM_ERRORS_SHOWN]:
        print(f"bad annotation: {error}", file=sys.stderr)
    if len(found.errors) > NUM_ERRORS_SHOWN:
        print(f"bad annotation: {len(found.errors) - NUM_ERRORS_SHOWN:,} more", file=sys.stderr)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_lines(target, found.rows)
    missing = {str(row["video"]) for row in found.rows if not os.path.exists(str(row["video"]))}
    num_videos = len({str(row["video"]) for row in found.rows})
    counts = {"rows": len(found.rows), "bad": len(found.errors), "videos": num_videos, "missing_videos": len(missing)}
    return {"suite": suite, "output": output, **counts}
