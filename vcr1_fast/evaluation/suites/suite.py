"""What a suite is: a public benchmark as a value, and what the readers of their files share.

A reader turns the published files into rows of our own schema. A row that one task alone could say is wrong (an answer
that is none of the options) is kept, as `vcr1-fast eval` counts what it has to refuse as a wrong answer; what has no
question or no video is left out and named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from vcr1_fast.prompts.annotation_files import read_entries
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field
from vcr1_fast.settings.config import ConfigError

Found = Iterator[tuple[str, "Row | ValueError"]]  # (file:where, the row or why there is none)
Made = Iterator[tuple[str, Callable[[], Row]]]  # (where in the file, what makes the row or raises ValueError)
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi")


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark: how its files are read, and where the rules stand."""

    name: str  # on the command line
    title: str  # as its authors call it
    tasks: tuple[str, ...]  # of its rows
    files: str  # what to name on the command line
    metric: str  # which metrics of the task its papers report
    format_source: str  # where the layout of the files is published
    rule_source: str  # where the scoring is
    checked: str  # what this reader was run on
    read: Callable[[Sequence[Path], Path], Found]  # (files, folder of the videos)
    average: tuple[str, ...] = ()  # axes of categories: the score is the mean over values of means; (): over rows


def read_each(files: Sequence[Path], to_rows: Callable[[Path, str, Entry], Made], is_mapping: bool = False) -> Found:
    """Rows of all entries of all files. `to_rows` gets file, where, and an entry that is an object; it may raise
    ValueError.

    Raises ConfigError for a file that is a JSON object by name and should be a list, or the other way round.
    """
    for file in files:
        entries = read_entries(file)
        if entries.is_mapping != is_mapping:
            wanted = "a JSON object of videos" if is_mapping else "a list of rows"
            raise ConfigError(f"{file} is not {wanted}: name another file or suite")
        for where, entry in entries.items:
            yield from _rows_of(file, where, entry, to_rows)


def read_rows(files: Sequence[Path], make: Callable[[Path, str, Entry], Row]) -> Found:
    """One row of each entry of files that are lists; see `read_each`."""
    return read_each(files, lambda file, where, entry: iter([(where, partial(make, file, where, entry))]))


def _rows_of(file: Path, where: str, entry: object, to_rows: Callable[[Path, str, Entry], Made]) -> Found:
    try:
        if isinstance(entry, ValueError):
            raise entry
        for row_where, make in to_rows(file, where, as_object(entry, "row")):
            yield f"{file}:{row_where}", made(make)
    except ValueError as error:
        yield f"{file}:{where}", error


def made(make: Callable[[], Row]) -> Row | ValueError:
    """What it makes, or the ValueError that it raises."""
    try:
        return make()
    except ValueError as error:
        return error


def as_object(value: object, what: str) -> Entry:
    """Raises ValueError unless it is a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"the {what} is a {type(value).__name__}, wanted an object")
    return value


def read_list(entry: Entry, key: str, what: str) -> list[object]:
    """A list of `what` with at least one item. Raises ValueError."""
    value = entry.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {value!r:.60}, wanted a list of {what}, at least one")
    return value


def read_options(entry: Entry, key: str) -> list[object]:
    """The options to choose from; whether they are texts is for the task to say. Raises ValueError."""
    options = read_field(entry, key)
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"{key} is {options!r:.60}, wanted a list of 2 to {len(ascii_uppercase)} texts")
    return options


def letter_at(index: object, num_options: int, key: str) -> str:
    """The letter of an option's number from 0, which some files write as text. Raises ValueError."""
    if not isinstance(index, bool) and str(index).isdecimal() and int(str(index)) < num_options:
        return ascii_uppercase[int(str(index))]
    raise ValueError(f"{key} is {index!r:.60}, wanted 0 to {num_options - 1}")


def letters_of(answer: str, options: Sequence[object]) -> list[str]:
    """The letters of all options that are the answer, or the answer itself, for the task to refuse, where none is."""
    return [letter for letter, option in zip(ascii_uppercase, options, strict=False) if option == answer] or [answer]


def choice_row(
    name: str,
    video: str,
    query: str,
    options: object,
    answer: object,
    categories: Mapping[str, object],
    scoring: str = "videomme",
) -> Row:
    """A row of the task multiple_choice. `scoring`: the rule that finds its letter, see tasks/benchmark_readers.py."""
    row: Row = {"id": name, "task": "multiple_choice", "video": video, "query": query, "options": options}
    row |= {"scoring": scoring} if scoring != "videomme" else {}
    return row | {"answer": answer, "categories": known_categories(categories)}


def known_categories(categories: Mapping[str, object]) -> dict[str, str | list[str]]:
    """Axis -> value or values as text; axes of which the file says nothing are left out."""
    return {
        axis: list(map(str, value)) if isinstance(value, list) else str(value)
        for axis, value in categories.items()
        if value is not None and value != []
    }


def find_video(root: Path, *names: str) -> str:
    """Absolute path of the first of these names, with or without a suffix, that is there; else that of the first name.

    A benchmark's archives were packed in several ways. `.mp4` is added where there is no suffix and nothing to see it
    from; a folder of images has none.
    """
    for name in names:
        path = _path(root, name)
        suffixes = ("",) if os.path.splitext(name)[1] in VIDEO_SUFFIXES else ("", *VIDEO_SUFFIXES)
        for suffix in suffixes:
            if os.path.exists(path + suffix):
                return path + suffix
    suffix = "" if os.path.splitext(names[0])[1] in VIDEO_SUFFIXES else ".mp4"
    return _path(root, names[0]) + suffix


def _path(root: Path, name: str) -> str:
    return os.path.abspath(os.path.expanduser(root / name))
