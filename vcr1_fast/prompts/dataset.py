"""Annotation files -> examples, and the order in which a run goes through them.

A file is of one of the schemas in `schemas`. What it says becomes rows of our own schema: objects with "task", "video",
"query", the fields of the task, and optionally "id" (default: file stem and row), "duration_s", "reasoning" and
"categories" (axis -> value or values). row_media.py has what else a row may show. The task checks and, in recipe fixed,
repairs them; nothing is left out without a line and a count.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from vcr1_fast.prompts.annotation_files import plain_name, printable, read_entries, require_text
from vcr1_fast.prompts.interval_defects import REFUSING, find_interval_defects
from vcr1_fast.prompts.row_media import MediaFolder, Trees, named_in
from vcr1_fast.prompts.schemas import find_schema
from vcr1_fast.prompts.schemas.schema import Recipe, Row, Schema, read_text
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, RefusedTruth, SampleError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class AnnotationSource:
    """One annotation file and how to read it."""

    path: str | Path
    video_root: str | None = None  # folder that relative video paths start from; None: the folder of the file
    schema: str = "auto"  # a name in `schemas.SCHEMAS`, or "auto" to see it from the content
    task: str | None = None  # which task a file is read for that could serve several (NExT-GQA)


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What became of one annotation file. As text: one line for people."""

    file: str
    schema: str
    num_rows: int  # of our own schema, the unusable ones included
    num_examples: int
    recipe: Recipe  # fixed: what is defective in examples was repaired; paper: kept as it is
    defects: dict[str, int]  # kind -> intervals that have it, in rows that became examples
    refused: dict[str, int]  # kind -> rows left out; they are the errors, one for one
    moved: str = ""  # how many videos and images are not where the file says
    num_texts: int = 0  # examples that show nothing

    def __str__(self) -> str:
        parts = [f"{self.file} (schema {self.schema}): {self.num_rows:,} rows, {self.num_examples:,} examples"]
        named = {"repaired" if self.recipe == "fixed" else "kept as they are": self.defects, "refused": self.refused}
        for what, counts in named.items():
            if counts:
                parts.append(f"{what}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
        parts += [f"{self.num_texts:,} show neither video nor image"] if self.num_texts else []
        parts += [self.moved] if self.moved else []
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """The content of one annotation file."""

    rows: list[Example]  # in the order of the file, refused ones (RefusedTruth) of a known task included
    errors: list[SampleError]  # one per row left out; the source is file:row, file:line or file:key
    summary: FileSummary

    @property
    def examples(self) -> list[Example]:
        """The usable rows."""
        return [row for row in self.rows if not row.is_refused]


def read_annotation_files(
    sources: Sequence[AnnotationSource], tasks: Mapping[str, Task], recipe: Recipe = "fixed"
) -> list[AnnotationFile]:
    """Examples, errors and summary of each file. Video files are not opened. Ids are unique over all files.

    tasks: by name, made for the same recipe.
    Raises ConfigError when a file is missing, named twice, broken as a whole, of no known schema, for an unknown task,
    or without a row.
    """
    for source in sources:
        if source.task is not None and source.task not in tasks:
            raise ConfigError(f"annotation file {source.path} is for the task {_unknown_task(source.task, tasks)}")
    files = [Path(os.path.abspath(os.path.expanduser(source.path))) for source in sources]
    uses = Counter((file, source.schema, source.task) for file, source in zip(files, sources, strict=True))
    for (file, _, _), count in uses.items():
        if count > 1:
            raise ConfigError(f"annotation file {file} is named {count} times: name it once")
    num_of_stem = Counter(_stem(file) for file in set(files))
    source_of_id: dict[str, str] = {}
    trees: Trees = {}
    result: list[AnnotationFile] = []
    for source in sources:
        file = Path(os.path.expanduser(source.path))
        entries = read_entries(file)
        if not entries.items:
            raise ConfigError(f"annotation file {file} holds no row: name another file")
        schema = find_schema(file, entries, source.schema, source.task)
        label = _stem(file) if num_of_stem[_stem(file)] == 1 else os.path.abspath(file)
        media = MediaFolder(str(source.video_root or file.parent), trees)
        loader = _Loader(file, label, tasks, media, source_of_id, schema, recipe)
        loader.add_all(entries.items)
        result.append(loader.finish())
    return result


def _stem(file: Path) -> str:
    return Path(plain_name(file)).stem


@dataclass
class _Loader:
    """Gathers the examples of one file and counts what is left out."""

    file: Path
    label: str
    tasks: Mapping[str, Task]
    media: MediaFolder
    source_of_id: dict[str, str]  # of all files so far
    schema: Schema
    recipe: Recipe
    rows: list[Example] = field(default_factory=list)
    errors: list[SampleError] = field(default_factory=list)
    defects: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def add_all(self, entries: Sequence[tuple[str, object]]) -> None:
        rows = [row for where, entry in entries for row in self._rows(where, entry)]
        self.media.tell_apart(row for _, row, error in rows if error is None)
        for where, row, error in rows:
            if error is None:
                self._add_row(printable(where), row)
            else:
                self._refuse(printable(where), row, "invalid", error)

    def _rows(self, where: str, entry: object) -> list[tuple[str, Row, ValueError | None]]:
        """The rows of an entry, or the one thing that is wrong with it."""
        try:
            if isinstance(entry, ValueError):
                raise entry
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f"the row is a {type(entry).__name__}, wanted an object with the keys {', '.join(self.schema.keys)}"
                )
            return [(row_where, row, None) for row_where, row in self.schema.to_rows(where, entry, self.recipe)]
        except ValueError as error:
            keys: dict[str, object] = dict(entry) if isinstance(entry, Mapping) else {}
            return [(where, keys | {"task": self.schema.task or keys.get("task")}, error)]

    def _add_row(self, where: str, row: Row) -> None:
        defects = find_interval_defects(row)
        source = f"{self.file}:{where}"
        refusing = (name for name in REFUSING if defects[name] and self.recipe == "fixed")
        kind = next(refusing, "invalid")
        try:
            require_text(row)
            example = _example(row, f"{self.label}:{where}", self.tasks, self.media)
            taken_by = self.source_of_id.get(example.id)
            if taken_by is not None:
                kind = "with the id of another"
                same_file = taken_by.removeprefix(f"{self.file}:")
                taken_by = taken_by if same_file == taken_by else f"row {same_file}"
                raise ValueError(f"id {example.id!r} is already taken by {taken_by}: ids must differ")
        except ValueError as error:
            self._refuse(where, row, kind, error)
        else:
            self.source_of_id[example.id] = source
            self.rows.append(example)
            self.defects += defects

    def _refuse(self, where: str, row: Mapping[str, object], kind: str, error: ValueError) -> None:
        reason = printable(str(error))
        self.errors.append(SampleError(f"{self.file}:{where}", reason))
        self.refused[kind] += 1
        task, video = row.get("task"), row.get("video")
        if not isinstance(task, str) or task not in self.tasks:
            return  # no score that it could count in
        path = video if isinstance(video, str) and video.strip() else ""
        with contextlib.suppress(ValueError):
            path = self.media.of_kind["video"].find(path) if path else ""
        query = row.get("query")
        refused = Example(
            id=f"{self.label}:{where}",  # not the row's own id, which a usable row may have as well
            task=task,
            video=printable(path),
            query=printable(query) if isinstance(query, str) else "",
            duration_s=math.inf,
            truth=RefusedTruth(reason),
            categories=tuple((printable(axis), printable(value)) for axis, value in _categories(row)),
        )
        self.rows.append(refused)

    def finish(self) -> AnnotationFile:
        num_examples = sum(not row.is_refused for row in self.rows)
        summary = FileSummary(
            file=self.file.name,
            schema=self.schema.name,
            num_rows=num_examples + len(self.errors),
            num_examples=num_examples,
            recipe=self.recipe,
            defects=dict(self.defects),
            refused=dict(self.refused),
            moved=self.media.describe_moved(),
            num_texts=sum(not row.is_refused and not row.sources for row in self.rows),
        )
        return AnnotationFile(self.rows, self.errors, summary)


def _example(row: Row, default_id: str, tasks: Mapping[str, Task], media: MediaFolder) -> Example:
    """One row as an Example. Raises ValueError with one reason."""
    task = read_text(row, "task")
    if task not in tasks:
        raise ValueError(f"task is {_unknown_task(task, tasks)}")
    needs_query = "query" in row or getattr(tasks[task], "needs_query", True)  # captioning asks the same of every clip
    if getattr(tasks[task], "needs_video", False):
        _require_one_video(row, task)
    query = read_text(row, "query") if needs_query else ""
    duration_s = _duration_s(row)
    reasoning = row.get("reasoning", "")
    if not isinstance(reasoning, str):
        raise ValueError(f"reasoning is {reasoning!r:.60}, wanted text")
    truth = tasks[task].parse_truth(row)
    if math.isinf(duration_s) and getattr(truth, "intervals_s", ()):
        raise ValueError("key 'duration_s' is missing, wanted the seconds of the video that the intervals lie in")
    name, (video, shown) = _id(row, default_id), _shown(row, media)
    for path in (video, *shown):
        if printable(path) != path:
            raise ValueError(f"it shows {printable(path)}, a path that is not UTF-8: rename it")
    return Example(name, task, video, query, duration_s, truth, reasoning, _categories(row), media=shown)


def _require_one_video(row: Row, task: str) -> None:
    num_videos = len(named_in(row, "video"))
    if num_videos == 0:
        read_text(row, "video")  # says what is wrong with it
    if num_videos != 1:
        raise ValueError(f"the row names {num_videos} videos, wanted one: the task {task} asks about one alone")


def _shown(row: Row, media: MediaFolder) -> tuple[str, tuple[str, ...]]:
    """(`Example.video`, `Example.media`): see there. Raises ValueError."""
    sources = media.sources(row)
    images, videos = sources["image"], sources["video"]
    return (videos[0] if videos else ""), ((*images, *videos) if images or len(videos) > 1 else ())


def _categories(row: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """(axis, value) pairs of "categories"; without it "type" is one, as in NExT-GQA (CW: causal why, ...).

    Anything else than an object of texts, numbers or lists of them says nothing.
    """
    found, kind = row.get("categories"), row.get("type")
    if not isinstance(found, Mapping):
        return (("type", kind),) if isinstance(kind, str) else ()
    pairs = ((str(axis), value) for axis, values in found.items() for value in _listed(values))
    return tuple(dict.fromkeys((axis, str(value)) for axis, value in pairs if isinstance(value, str | int | float)))


def _listed(value: object) -> list[object] | tuple[object, ...]:
    return value if isinstance(value, list | tuple) else [value]


def _unknown_task(task: str, tasks: Mapping[str, Task]) -> str:
    near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.0)
    return f"{task!r}, wanted one of {', '.join(tasks)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _id(row: Row, default: str) -> str:
    value = row.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"id is {value!r:.60}, wanted text or a whole number")
    return str(value)


def _duration_s(row: Row) -> float:
    """Seconds; infinity when the row does not say."""
    value = row.get("duration_s")
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"duration_s is {value!r:.60}, wanted a number of seconds")
    try:
        duration_s = float(value)
    except OverflowError:  # JSON allows whole numbers of any length
        duration_s = math.inf
    if not math.isfinite(duration_s) or duration_s <= 0:
        raise ValueError(f"duration_s is {value!r:.60}, wanted a finite number of seconds > 0")
    return duration_s


class DataOrder:
    """An endless stream of item indices: one seeded permutation per epoch, one after the other.

    A pure function of the position in the stream, so that every item comes exactly once an epoch on any number of
    ranks and a resumed run goes on where it stopped. (The original shuffles unseeded on each rank and so covers an
    expected 65.6 % of its items an epoch.)
    """

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self.seed = seed

    def indices(self, start: int, count: int) -> list[int]:
        """Items at the stream positions start .. start + count - 1."""
        result: list[int] = []
        while len(result) < count:
            epoch, offset = divmod(start + len(result), self.num_items)
            rest = count - len(result)
            result += _permutation(self.num_items, self.seed, epoch)[offset : offset + rest]
        return result


@lru_cache(maxsize=4)  # a step asks for one epoch, or two at a border; 12,408 items take 1 ms
def _permutation(num_items: int, seed: int, epoch: int) -> list[int]:
    # Sorting a bit generator's raw words: numpy promises these never change between versions, unlike `permutation`.
    words = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_items)
    return np.argsort(words, kind="stable").tolist()


def shard(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The contiguous equal share of one rank; the items divide by the ranks."""
    share, rest = divmod(len(items), world_size)
    assert rest == 0, f"{len(items)} items for {world_size} ranks"
    return list(items[rank * share : (rank + 1) * share])
