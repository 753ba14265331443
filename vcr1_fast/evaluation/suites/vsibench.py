"""VSI-Bench (arXiv 2412.14171): spaces seen in indoor videos; multiple choice, and numbers to be estimated.

Rows (parquet or JSONL) of nyu-visionx/VSI-Bench: id, dataset (arkitscenes, scannet, scannetpp), scene_name,
question_type, question, options ("A. ...", none for a number), ground_truth (a letter, or a number). Videos:
DATASET/SCENE.mp4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Suite,
    choice_row,
    find_video,
    known_categories,
    read_options,
    read_rows,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

CHOICES = {  # question_type -> the task in which the benchmark's table counts it
    "object_rel_direction_easy": "object_rel_direction",
    "object_rel_direction_medium": "object_rel_direction",
    "object_rel_direction_hard": "object_rel_direction",
    "object_rel_distance": "object_rel_distance",
    "route_planning": "route_planning",
    "obj_appearance_order": "obj_appearance_order",
}
NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")


def _read(files: Sequence[Path], videos: Path) -> Found:
    return read_rows(files, lambda file, where, entry: _row(entry, videos))


def _row(entry: Entry, videos: Path) -> Row:
    kind, name = read_text(entry, "question_type"), f"vsibench:{read_field(entry, 'id')}"
    dataset, query = read_text(entry, "dataset"), read_text(entry, "question")
    video = find_video(videos, f"{dataset}/{read_text(entry, 'scene_name')}")
    answer = read_field(entry, "ground_truth")
    if kind in CHOICES:
        categories = {"task": CHOICES[kind], "question_type": kind, "dataset": dataset}
        return choice_row(name, video, query, read_options(entry, "options"), answer, categories)
    if kind in NUMBERS:
        row: Row = {"id": name, "task": "numeric_answer", "video": video, "query": query, "answer": answer}
        return row | {"categories": known_categories({"task": kind, "question_type": kind, "dataset": dataset})}
    raise ValueError(f"question_type is {kind!r:.60}, wanted one of {', '.join((*CHOICES, *NUMBERS))}")


SUITE = Suite(
    name="vsibench",
    title="VSI-Bench",
    tasks=("multiple_choice", "numeric_answer"),
    files="test.parquet or JSONL of nyu-visionx/VSI-Bench; --videos: folder that holds arkitscenes/, scannet/, ...",
    metric="acc of choices, mra of numbers; mean over 8 tasks, object_rel_direction the mean of its three kinds",
    format_source="the card of nyu-visionx/VSI-Bench; thinking-in-space, lmms_eval/tasks/vsibench/utils.py",
    rule_source="vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench/utils.py",
    checked="the published columns only; mean relative accuracy against the benchmark's function",
    read=_read,
    average=("task", "question_type"),
)
