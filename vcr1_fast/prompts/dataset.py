"""Annotation files -> examples, and the order in which a run goes through them.

A file is a JSON list or JSONL of objects: "task", "video", "query", "duration_s", the fields of that task, and
optionally "id" (default: file stem and row) and "reasoning".
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from vcr1_fast.config import ConfigError
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, SampleError

Item = TypeVar("Item")


def load_annotations(
    path: str | Path, tasks: Mapping[str, Task], video_root: str | None = None
) -> tuple[list[Example], list[SampleError]]:
    """Examples of one file, and one error per row that cannot be used. Rows count from 1 (JSONL: lines).

    Relative video paths start from `video_root`, or from the file's own folder. Video files are not opened here.

    Raises ConfigError when the file is missing, is not JSON or JSONL, or holds no row.
    """
    file = Path(path).expanduser()
    root = Path(video_root).expanduser() if video_root else file.parent
    examples: list[Example] = []
    errors: list[SampleError] = []
    row_of_id: dict[str, int] = {}
    for row_number, row in _rows(file):
        try:
            example = _example(row, f"{file.stem}:{row_number}", tasks, root)
            if example.id in row_of_id:
                raise ValueError(f"id {example.id!r} is already taken by row {row_of_id[example.id]}: ids must differ")
        except ValueError as error:
            errors.append(SampleError(f"{file}:{row_number}", str(error)))
        else:
            row_of_id[example.id] = row_number
            examples.append(example)
    if not examples and not errors:
        raise ConfigError(f"annotation file {file} holds no row: name another file")
    return examples, errors


def _rows(file: Path) -> Iterator[tuple[int, object]]:
    """(row number, parsed row); a line of JSONL that does not parse comes as the ValueError itself."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"annotation file {file} cannot be read: {reason}: check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"annotation file {file} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"annotation file {file} starts like a JSON list but is not valid JSON: {error}"
            ) from error
        yield from enumerate(rows, start=1)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    parsed = [(number, _parse_line(line)) for number, line in lines]
    if parsed and all(isinstance(row, ValueError) for _, row in parsed):
        number, error = parsed[0]
        raise ConfigError(f"annotation file {file} is neither a JSON list nor JSONL; line {number}: {error}")
    yield from parsed


def _parse_line(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        return ValueError(f"not valid JSON: {error}")


def _example(row: object, default_id: str, tasks: Mapping[str, Task], root: Path) -> Example:
    """One row as an Example. Raises ValueError with one reason."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(
            f"the row is a {type(row).__name__}, wanted an object with keys task, video, query, duration_s"
        )
    task = _text(row, "task")
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.0)
        raise ValueError(f"task is {task!r}, wanted one of {', '.join(tasks)}; did you mean {near[0]!r}?")
    video, query, duration_s = _text(row, "video"), _text(row, "query"), _duration_s(row)
    reasoning = row.get("reasoning", "")
    if not isinstance(reasoning, str):
        raise ValueError(f"reasoning is {reasoning!r}, wanted text")
    truth = tasks[task].parse_truth(row)
    absolute = os.path.abspath(root / Path(video).expanduser())
    return Example(_id(row, default_id), task, absolute, query, duration_s, truth, reasoning)


def _value(row: Mapping[str, object], key: str) -> object:
    if key not in row:
        raise ValueError(f"key {key!r} is missing; the row has {', '.join(map(str, row)) or 'none'}")
    return row[key]


def _text(row: Mapping[str, object], key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, wanted text that is not empty")
    return value


def _id(row: Mapping[str, object], default: str) -> str:
    value = row.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"id is {value!r}, wanted text or a whole number")
    return str(value)


def _duration_s(row: Mapping[str, object]) -> float:
    value = _value(row, "duration_s")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"duration_s is {value!r}, wanted a number of seconds")
    try:
        duration_s = float(value)
    except OverflowError:  # JSON allows whole numbers of any length
        duration_s = math.inf
    if not math.isfinite(duration_s) or duration_s <= 0:
        raise ValueError(f"duration_s is {value!r}, wanted a finite number of seconds > 0")
    return duration_s


class DataOrder:
    """An endless stream of item indices: one seeded permutation per epoch, one after the other.

    A pure function of the position in the stream, so that every item comes exactly once an epoch on any number of
    ranks and a resumed run goes on where it stopped. (The original shuffles unseeded on each rank and so covers an
    expected 65.6 % of its items an epoch.)
    """

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}, wanted at least 1 item to put in order")
        self.num_items = num_items
        self.seed = seed

    def indices(self, start: int, count: int) -> list[int]:
        """Items at the stream positions start .. start + count - 1."""
        if start < 0 or count < 0:
            raise ValueError(f"start is {start} and count is {count}, wanted both >= 0")
        result: list[int] = []
        while len(result) < count:
            epoch, offset = divmod(start + len(result), self.num_items)
            rest = count - len(result)
            result += _permutation(self.num_items, self.seed, epoch)[offset : offset + rest]
        return result

    def epoch_of(self, position: int) -> int:
        """Which pass over the items a stream position belongs to, from 0."""
        return position // self.num_items


@lru_cache(maxsize=4)  # a step asks for one epoch, or two at a border; 12,408 items take 1 ms
def _permutation(num_items: int, seed: int, epoch: int) -> list[int]:
    # Sorting a bit generator's raw words: numpy promises these never change between versions, unlike `permutation`.
    words = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_items)
    return np.argsort(words, kind="stable").tolist()


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The contiguous equal share of one rank. Raises ValueError when the items do not divide by the ranks."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, wanted 0 .. {world_size - 1} for world_size {world_size}")
    if len(items) % world_size:
        raise ValueError(f"{len(items)} items do not divide by {world_size} ranks: make the count a multiple of it")
    share = len(items) // world_size
    return list(items[rank * share : (rank + 1) * share])
