"""VidTAB's quality questions in the layout of VideoChat-R1.

[{"video": "1378.mp4", "instruction": "How about the quality ...", "answer": "low quality"}, ...]
"""

from __future__ import annotations

from collections.abc import Iterator

from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema, read_field, read_text


def _to_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    video, query = read_text(entry, "video"), read_text(entry, "instruction")
    yield where, {"task": "video_quality", "video": video, "query": query, "answer": read_field(entry, "answer")}


SCHEMA = Schema("vidtab", "video_quality", ("video", "instruction", "answer"), is_mapping=False, to_rows=_to_rows)
