"""Temporal grounding in the layout video -> duration, spans, sentences: what three benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import Found, Made, find_video, read_each
from vcr1_fast.prompts.schemas.charades import sentence_rows
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_text


def read_sentences(
    suite: str, files: Sequence[Path], videos: Path, keys: tuple[str, str], clean: Callable[[str], str] = str
) -> Found:
    """One row per sentence, `SUITE:VIDEO:1`, ... `keys`: those of the spans and of the sentences."""

    def to_rows(file: Path, where: str, entry: Entry) -> Made:
        for row_where, row in sentence_rows(where, entry, "paper", *keys):
            yield row_where, partial(_row, suite, row_where, where, row, videos, clean)

    return read_each(files, to_rows, is_mapping=True)


def _row(suite: str, where: str, video: str, row: Row, videos: Path, clean: Callable[[str], str]) -> Row:
    query = clean(read_text(row, "query"))
    return {"id": f"{suite}:{where}"} | row | {"video": find_video(videos, video), "query": query}
