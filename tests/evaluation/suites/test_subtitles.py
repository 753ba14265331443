"""Subtitles: what a SubRip file says, which of them belong to the frames, and the question they stand before."""

import json
from pathlib import Path

import pytest

from tests.video import clips
from vcr1_fast.evaluation.suites.command import read_suite
from vcr1_fast.evaluation.suites.subtitles import Subtitles, parse_subtitles, shown_subtitles

SRT = """\
1
00:00:00,000 --> 00:00:01,500
<font color="white" size=".72c">Hi guys,</font>

2
00:00:01,500 --> 00:00:04,020
I'm going to show you
<i>how to</i>  cook.

3
00:00:04,020 --> 00:00:05,000

4
no times here

5
01:02:03.25 --> 01:02:04,000 X1:40 X2:600
An hour later
"""
SPOKEN = [
    (0.0, 1.5, "Hi guys,"),
    (1.5, 4.02, "I'm going to show you how to  cook."),
    (3723.25, 3724.0, "An hour later"),
]


def test_a_subrip_file():
    assert parse_subtitles(SRT) == SPOKEN
    assert parse_subtitles(SRT.replace("\n", "\r\n")) == SPOKEN
    assert parse_subtitles("") == parse_subtitles("nothing\n\nof the kind") == []


def test_subtitles_of_frames():
    """8 frames at 2 a second: a subtitle from 1.5 to 4.02 s is on screen in frames 3 to 7, not in 8."""
    spoken = [(0.0, 0.4, "none"), (0.0, 1.5, "a"), (1.5, 4.02, "b"), (1.9, 2.1, "c"), (60.0, 61.0, "late")]

    def shown(num_frames: int) -> str:
        return "".join(text for _, _, text in shown_subtitles(spoken, 8, 2.0, num_frames))

    assert shown(8) == "abc"  # "none" begins and ends in frame 0
    assert shown(2) == "ab"  # frames 0 and 7
    assert shown(1) == "a"
    assert shown(3) == "abc"  # frames 0, 3 and 7; "c" is that of frame 3


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    entry = {"duration": "short", "domain": "d", "sub_category": "s", "task_type": "t", "options": ["A. a", "B. b"]}
    rows = [
        entry | {"question_id": f"{name}-1", "videoID": name, "question": "What is cooked?", "answer": "A"}
        for name in ("said", "silent", "odd")
    ]
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "said.srt").write_text(SRT)
    (tmp_path / "subtitle" / "odd.srt").write_bytes(b"\xff\xfe1")
    file = tmp_path / "test.json"
    file.write_text(json.dumps(rows))
    return file


def test_the_question_stands_behind_the_subtitles(questions: Path):
    subtitles = Subtitles(questions.parent / "subtitle")
    found = read_suite("videomme", [questions], subtitles=subtitles)
    assert [row["query"] for row in found.rows] == [
        "Subtitles of the video:\nHi guys,\nI'm going to show you how to  cook.\nAn hour later\n\n"
        "Question: What is cooked?",
        "What is cooked?",
    ]
    assert subtitles.num_without == 1
    (error,) = found.errors
    assert error.source.endswith("test.json:3") and "odd.srt is not UTF-8 text" in error.reason


def test_only_the_subtitles_of_the_frames_that_are_shown(questions: Path):
    clips.write_clip(questions.parent / "said.mp4", num_frames=50, fps=25)  # 2 s
    found = read_suite("videomme", [questions], subtitles=Subtitles(questions.parent / "subtitle", num_frames=1))
    assert found.rows[0]["query"] == "Subtitles of the video:\nHi guys,\n\nQuestion: What is cooked?"
    both = read_suite("videomme", [questions], subtitles=Subtitles(questions.parent / "subtitle", num_frames=2))
    assert "cook." in str(both.rows[0]["query"]) and "later" not in str(both.rows[0]["query"])
    (questions.parent / "said.mp4").unlink()
    lost = read_suite("videomme", [questions], subtitles=Subtitles(questions.parent / "subtitle", num_frames=2))
    assert [row["id"] for row in lost.rows] == ["videomme:silent-1"]
    assert "which subtitles belong to its frames is not known" in lost.errors[0].reason
