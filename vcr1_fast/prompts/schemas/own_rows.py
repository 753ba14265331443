"""Our own schema: every row is an object with "task", what it shows, mostly "query", and the fields of its task.

A captioning row needs no query, as the same is asked of every video.
"""

from __future__ import annotations

from collections.abc import Iterator

from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema


def _to_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    yield where, dict(entry)


SCHEMA = Schema(name="rows", task=None, keys=("task",), is_mapping=False, to_rows=_to_rows)
