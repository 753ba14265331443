"""Video-MME (arXiv 2405.21075): multiple choice, 900 videos of three lengths, 3 questions each.

Parquet or JSON rows of lmms-lab/Video-MME: videoID, question_id, question, options ("A. Apples.", ...), answer,
duration (short, medium, long), domain, sub_category, task_type. Or the JSON that the benchmark's own script scores: one
object per video, its questions in a list "questions".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vcr1_fast.evaluation.suites.suite import (
    Found,
    Made,
    Suite,
    as_object,
    choice_row,
    find_video,
    read_each,
    read_list,
    read_options,
)
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text

AXES = ("duration", "domain", "sub_category", "task_type")


def _read(files: Sequence[Path], videos: Path) -> Found:
    def to_rows(file: Path, where: str, entry: Entry) -> Made:
        if "questions" not in entry:
            yield where, partial(_row, entry, videos)
            return
        for number, question in enumerate(read_list(entry, "questions", "questions"), start=1):
            yield f"{where}:{number}", partial(_question_row, entry, question, videos)

    return read_each(files, to_rows)


def _question_row(video: Entry, question: object, videos: Path) -> Row:
    return _row({**video, **as_object(question, "question")}, videos)


def _row(entry: Entry, videos: Path) -> Row:
    return choice_row(
        f"videomme:{read_text(entry, 'question_id')}",
        find_video(videos, _video_name(entry)),
        read_text(entry, "question"),
        read_options(entry, "options"),  # the task takes the letters off
        read_field(entry, "answer"),
        {axis: read_text(entry, axis) for axis in AXES},
    )


def _video_name(entry: Entry) -> str:
    """The YouTube id, after which the video files are named; where only the address says it, the one there."""
    if "videoID" in entry or "url" not in entry:
        return read_text(entry, "videoID" if "videoID" in entry else "video_id")
    url = urlsplit(read_text(entry, "url"))
    return parse_qs(url.query).get("v", [url.path.rpartition("/")[2]])[0]


SUITE = Suite(
    name="videomme",
    title="Video-MME",
    tasks=("multiple_choice",),
    files="test.parquet of lmms-lab/Video-MME, or the JSON that its own script scores; --subtitles FOLDER of .srt",
    metric="acc, and by duration",
    format_source="BradyFU/Video-MME, evaluation/output_test_template.json; lmms-eval, tasks/videomme/utils.py",
    rule_source="lmms-eval, tasks/videomme/utils.py; subtitles: README of BradyFU/Video-MME",
    checked="the benchmark's template, without its trailing commas; the parquet by its published columns only",
    read=_read,
)
