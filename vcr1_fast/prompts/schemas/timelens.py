"""TimeLens (arXiv 2512.14698), as TencentARC/TimeLens, timelens/dataset/timelens_data.py reads it.

TimeLens-Bench, an object by video, one period for each query, and TimeLens-100K, lines with periods for each event:

    {"AO8RW": {"duration": 33.75, "spans": [[0.0, 6.9]], "queries": ["a person is ..."]}, ...}
    {"source": "cosmo_cap", "video_path": "a/b.mp4", "duration": 60.1, "events": [{"query": "...", "span": [[1, 9]]}]}

Seconds. Blanks in a query are folded and full stops at its ends dropped. One row per query, `AO8RW:1`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vcr1_fast.prompts.schemas.charades import sentence_rows
from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema, read_field, read_text


def clean_query(query: str) -> str:
    """One blank between words, no full stop at either end."""
    return " ".join(query.split()).strip(".").strip()


def _bench_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    for row_where, row in sentence_rows(where, entry, recipe, "spans", "queries"):
        yield row_where, row | {"query": clean_query(read_text(row, "query"))}


def _event_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    events = read_field(entry, "events")
    if not isinstance(events, list) or not events:
        raise ValueError(f"events is {events!r:.60}, wanted a list of objects with query and span, not empty")
    row: Row = {"task": "temporal_grounding", "video": read_text(entry, "video_path")}
    row |= {"duration_s": read_field(entry, "duration")}
    for number, event in enumerate(events, start=1):
        if not isinstance(event, Mapping):
            raise ValueError(f"event {number} is {event!r:.60}, wanted an object with query and span")
        span = read_field(event, "span")
        is_one = isinstance(span, list) and bool(span) and not isinstance(span[0], list)
        query = clean_query(read_text(event, "query"))
        yield f"{where}:{number}", row | {"query": query, "intervals": [span] if is_one else span}


BENCH_SCHEMA = Schema(
    "timelens_bench", "temporal_grounding", ("duration", "spans", "queries"), is_mapping=True, to_rows=_bench_rows
)
SCHEMA = Schema(
    "timelens_100k", "temporal_grounding", ("video_path", "duration", "events"), is_mapping=False, to_rows=_event_rows
)
