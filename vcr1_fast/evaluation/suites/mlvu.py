"""MLVU (arXiv 2406.04264): multiple choice over long videos, 7 tasks in the dev set, 9 in the test set.

dev: one JSON list per task, 1_plotQA.json to 7_topic_reasoning.json: video, question, candidates, answer (the text of
one candidate), question_type. test: test_mcq_gt.json, one list with question_id beside. The sub-scene captions and
summaries (8, 9) have no candidates and are no multiple choice.

Of candidates that are alike the last counts, as in the benchmark's choice_bench.py. Its two questions whose answer is
no candidate can only be answered wrong there, and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Suite,
    choice_row,
    find_video,
    letters_of,
    read_options,
    read_rows,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

NO_TEXT = "-"  # three questions have a candidate without a word, which is shown all the same


def _read(files: Sequence[Path], videos: Path) -> Found:
    return read_rows(files, lambda file, where, entry: _row(file.stem, where, entry, videos))


def _row(stem: str, where: str, entry: Entry, videos: Path) -> Row:
    candidates, answer = read_options(entry, "candidates"), read_field(entry, "answer")
    task, video = read_text(entry, "question_type"), read_text(entry, "video")
    name = read_text(entry, "question_id") if "question_id" in entry else f"{task}:{where}"
    folder = stem.partition("_")[2]  # plotQA of 1_plotQA
    return choice_row(
        f"mlvu:{name}",
        find_video(videos, f"video/{stem}/{video}", f"video/{folder}/{video}", f"video/{video}", video),
        read_text(entry, "question"),
        [candidate or NO_TEXT for candidate in candidates],
        letters_of(str(answer), candidates)[-1],
        {"task": task},
        scoring="mlvu",
    )


SUITE = Suite(
    name="mlvu",
    title="MLVU (multiple choice, dev or test)",
    tasks=("multiple_choice",),
    files="1_plotQA.json ... 7_topic_reasoning.json (dev), or test_mcq_gt.json; --videos: folder that holds video/",
    metric="acc, mean over the tasks (M-Avg)",
    format_source="JUNJIE99/MLVU, data/*.json and evaluation_test/test_bench.py",
    rule_source="JUNJIE99/MLVU, evaluation/multiple_choice_evaluation/choice_bench.py; letter: lmms-eval, tasks/mlvu",
    checked="the dev set, 2,175 questions (one of them without a word is left out); the test set by its keys only",
    read=_read,
    average=("task",),
)
