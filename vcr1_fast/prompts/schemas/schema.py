"""What a schema of annotation files is: how to tell it, and how its entries become rows of our own schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Recipe = Literal["fixed", "paper"]
Row = dict[str, object]  # our own schema: "task", "video", "query", what the task needs; "id", "duration_s" if known
Entry = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Schema:
    """One layout of annotation files. Its rows hold what the file says; the tasks check and repair it."""

    name: str
    task: str | None  # task of all rows; None: each row says its own
    keys: tuple[str, ...]  # an entry of this schema has at least these
    is_mapping: bool  # a JSON object by video id; else a list of entries
    to_rows: Callable[[str, Entry, Recipe], Iterator[tuple[str, Row]]]  # (where, entry, recipe) -> (where, row) ...

    def describe(self) -> str:
        """For error messages: name and looks."""
        keys = ", ".join(self.keys)
        return f"{self.name} ({f'JSON object: video id -> {keys}' if self.is_mapping else f'rows with {keys}'})"


def read_field(entry: Entry, key: str) -> object:
    """Raises ValueError that lists the keys there are."""
    if key not in entry:
        raise ValueError(f"key {key!r} is missing; the row has {', '.join(map(str, entry)) or 'none'}")
    return entry[key]


def read_text(entry: Entry, key: str) -> str:
    """Text that is not blank. Raises ValueError."""
    value = read_field(entry, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r:.60}, wanted text that is not empty")
    return value
