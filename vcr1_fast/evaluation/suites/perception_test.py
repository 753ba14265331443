"""Perception Test (arXiv 2305.13786): multiple choice, three options.

google-deepmind/perception_test: JSON object video -> "mc_question", a list of id, question, options, answer_id, area,
reasoning, tag. Or the parquet of lmms-lab, one row per question, with video_name and question_id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Made,
    Suite,
    as_object,
    choice_row,
    find_video,
    letter_at,
    read_each,
    read_list,
    read_options,
    read_rows,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

AXES = ("area", "reasoning", "tag")


def _read(files: Sequence[Path], videos: Path) -> Found:
    def flat(file: Path, where: str, entry: Entry) -> Row:
        return _row(read_text(entry, "video_name"), entry, "question_id", videos)

    def by_video(file: Path, where: str, entry: Entry) -> Made:
        if entry.get("mc_question") == []:
            return  # a video of the benchmark's other tasks
        for number, question in enumerate(read_list(entry, "mc_question", "questions"), start=1):
            yield f"{where}:{number}", partial(_row, where, question, "id", videos)

    for file in files:
        is_flat = file.suffix.lower() == ".parquet"
        yield from read_rows([file], flat) if is_flat else read_each([file], by_video, is_mapping=True)


def _row(video: str, question: object, id_key: str, videos: Path) -> Row:
    entry = as_object(question, "question")
    options = read_options(entry, "options")
    return choice_row(
        f"perception_test:{video}:{read_field(entry, id_key)}",
        find_video(videos, video),
        read_text(entry, "question"),
        options,
        letter_at(read_field(entry, "answer_id"), len(options), "answer_id"),
        {axis: entry.get(axis) for axis in AXES},
        scoring="perception_test",
    )


SUITE = Suite(
    name="perception_test",
    title="Perception Test (multiple-choice video QA)",
    tasks=("multiple_choice",),
    files="all_valid.json, or the parquet mc_question_val of lmms-lab/PerceptionTest_Val",
    metric="acc, and by area, reasoning and tag",
    format_source="google-deepmind/perception_test, README.md; lmms-eval, tasks/perceptiontest/val/utils.py",
    rule_source="lmms-eval, tasks/perceptiontest/val/utils.py",
    checked="the published description only",
    read=_read,
)
