"""LongVideoBench (arXiv 2407.15754): multiple choice, 2 to 5 options, videos of 8 s to an hour.

lvb_val.json: a list of id, video_path, question, candidates, correct_choice (number from 0), duration_group (15, 60,
600, 3600), question_category, topic_category, level. Or the parquet of the same data set, with option0 to option4,
"N/A" where there are fewer. The test split (lvb_test_wo_gt.json) has no correct_choice: its answers are withheld.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Suite,
    choice_row,
    find_video,
    letter_at,
    read_options,
    read_rows,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

AXES = ("duration_group", "question_category", "topic_category", "level")
NUM_COLUMNS = 5  # option0 to option4
NO_OPTION = "N/A"


def _read(files: Sequence[Path], videos: Path) -> Found:
    return read_rows(files, lambda file, where, entry: _row(entry, videos))


def _row(entry: Entry, videos: Path) -> Row:
    options = read_options(entry, "candidates") if "candidates" in entry else _columns(entry)
    name = read_text(entry, "video_path")
    return choice_row(
        f"longvideobench:{read_text(entry, 'id')}",
        find_video(videos, f"videos/{name}", name),
        read_text(entry, "question"),
        options,
        letter_at(read_field(entry, "correct_choice"), len(options), "correct_choice"),
        {axis: entry.get(axis) for axis in AXES},
    )


def _columns(entry: Entry) -> list[object]:
    columns = [read_field(entry, f"option{number}") for number in range(NUM_COLUMNS)]
    return columns[: columns.index(NO_OPTION)] if NO_OPTION in columns else columns


SUITE = Suite(
    name="longvideobench",
    title="LongVideoBench (validation, without subtitles)",
    tasks=("multiple_choice",),
    files="lvb_val.json, or the parquet of the validation split; --videos: folder that holds videos/",
    metric="acc, and by duration_group and question_category",
    format_source="longvideobench/LongVideoBench, longvideobench_dataset.py; lmms-eval, tasks/longvideobench/utils.py",
    rule_source="lmms-eval, tasks/longvideobench/utils.py (longvideobench_val_v; it guesses where it reads no letter)",
    checked="keys and values of the first rows of lvb_val.json; the parquet by its published columns only",
    read=_read,
)
