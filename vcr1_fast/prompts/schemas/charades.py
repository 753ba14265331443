"""Charades-STA and ActivityNet Captions in the layout of TimeZero, which VideoChat-R1 trains on.

    {"AO8RW": {"duration": 33.75, "timestamps": [[0.0, 6.9]], "sentences": ["a person is ..."]}, ...}

Seconds. Some ActivityNet files also carry "phrases", which nothing here needs. One row per sentence, `AO8RW:1`, ...
"""

from __future__ import annotations

from collections.abc import Iterator

from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema, read_field


def _to_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    return sentence_rows(where, entry, recipe, "timestamps", "sentences")


def sentence_rows(
    where: str, entry: Entry, recipe: Recipe, spans_key: str, sentences_key: str
) -> Iterator[tuple[str, Row]]:
    """Rows of one video; fixed: without blanks around a query.

    Raises ValueError when sentences and spans do not belong together.
    """
    duration_s = read_field(entry, "duration")
    timestamps, sentences = read_field(entry, spans_key), read_field(entry, sentences_key)
    if not isinstance(timestamps, list) or not isinstance(sentences, list) or not sentences:
        kind = type(timestamps).__name__
        raise ValueError(f"{spans_key} is a {kind} and {sentences_key} {sentences!r:.60}, wanted two lists, not empty")
    if len(timestamps) != len(sentences):
        raise ValueError(
            f"there are {len(timestamps)} {spans_key} but {len(sentences)} {sentences_key}, wanted one for one"
        )
    for number, (interval, sentence) in enumerate(zip(timestamps, sentences, strict=True), start=1):
        query = sentence.strip() if isinstance(sentence, str) and recipe == "fixed" else sentence
        row: Row = {"task": "temporal_grounding", "video": where, "query": query}
        yield f"{where}:{number}", row | {"duration_s": duration_s, "intervals": [interval]}


SCHEMA = Schema(
    name="charades",
    task="temporal_grounding",
    keys=("duration", "timestamps", "sentences"),
    is_mapping=True,
    to_rows=_to_rows,
)
