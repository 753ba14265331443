"""NExT-GQA in the layout of VideoChat-R1, for grounded QA or, without the intervals, for multiple choice.

    [{"id": "4882821564_1", "video": "1104/4882821564.mp4", "question": "why did ...", "options": ["(A) ...", ...],
      "duration": 90, "glue": [[13.8, 29.8]], "type": "CW", "answer": "(C)"}, ...]

Seconds. Options keep their letters. "type" (causal why and how, temporal current, next and previous) goes along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vcr1_fast.prompts.schemas.schema import Entry, Recipe, Row, Schema, read_field, read_text

KEYS = ("video", "question", "options", "answer")
_LETTER = re.compile(r"\(([A-Z])\)")


def _question(entry: Entry, task: str) -> Row:
    row: Row = {"task": task, "video": read_text(entry, "video"), "query": read_text(entry, "question")}
    row |= {"options": read_field(entry, "options"), "answer": _letter(read_field(entry, "answer"))}
    if "duration" in entry:
        row["duration_s"] = entry["duration"]
    if "type" in entry:
        row["type"] = entry["type"]
    return row


def _letter(answer: object) -> object:
    """C of (C); anything else as it is, for the task to judge."""
    match = _LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    return match[1] if match else answer


def _grounded_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    row = _question(entry, "grounded_qa") | {"intervals": read_field(entry, "glue")}
    yield where, row | ({"id": entry["id"]} if "id" in entry else {})


def _choice_rows(where: str, entry: Entry, recipe: Recipe) -> Iterator[tuple[str, Row]]:
    # Another id than the grounded question's: one file may serve both tasks in a run.
    row = _question(entry, "multiple_choice")
    yield where, row | ({"id": f"{entry['id']}:choice"} if "id" in entry else {})


SCHEMA = Schema("nextgqa", "grounded_qa", (*KEYS, "glue"), is_mapping=False, to_rows=_grounded_rows)
CHOICE_SCHEMA = Schema("nextgqa_choice", "multiple_choice", KEYS, is_mapping=False, to_rows=_choice_rows)
