"""LVBench (arXiv 2406.08035): multiple choice, four options, videos of more than half an hour.

video_info.meta.jsonl: one object per video: key (its YouTube id) and "qa", a list of uid, question (with its options on
lines of their own, "(A) ..."), answer (a letter), question_type (several), time_reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Made,
    Suite,
    as_object,
    choice_row,
    find_video,
    read_each,
    read_list,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

_OPTION = re.compile(r"\n\s*\(([A-Z])\)")


def _read(files: Sequence[Path], videos: Path) -> Found:
    def to_rows(file: Path, where: str, entry: Entry) -> Made:
        key = read_text(entry, "key")
        for number, question in enumerate(read_list(entry, "qa", "questions"), start=1):
            yield f"{where}:{number}", partial(_row, key, question, videos)

    return read_each(files, to_rows)


def _row(key: str, question: object, videos: Path) -> Row:
    entry = as_object(question, "question")
    asked, *marked = _OPTION.split(read_text(entry, "question"))
    letters, options = marked[::2], [option.strip() for option in marked[1::2]]
    if len(options) < 2 or letters != list(ascii_uppercase[: len(letters)]):
        raise ValueError(
            f"question has the options {', '.join(letters) or 'none'}, wanted lines (A), (B), ... in order"
        )
    return choice_row(
        f"lvbench:{read_field(entry, 'uid')}",
        find_video(videos, key, f"all_videos/{key}", f"videos/{key}"),
        asked.strip(),
        options,
        read_field(entry, "answer"),
        {"question_type": entry.get("question_type")},
    )


SUITE = Suite(
    name="lvbench",
    title="LVBench",
    tasks=("multiple_choice",),
    files="video_info.meta.jsonl",
    metric="acc, and by question_type",
    format_source="THUDM/LVBench, README.md and scripts; yeliudev/VideoMind, dataset/sub_classes/lvbench.py",
    rule_source="THUDM/LVBench, lvbench/metrics/compute_accuracy.py and utils/answer_util.py",
    checked="the published description only",
    read=_read,
)
