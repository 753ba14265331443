"""Temporal grounding by a sentence, and how TimeLens reads one: by hand."""

import time
from dataclasses import replace

import pytest

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.benchmark_readers import read_timelens
from vcr1_fast.tasks.grounding_sentence import GroundingBySentence
from vcr1_fast.tasks.unlabelled import read_answer
from vcr1_fast.types import Example, IntervalTruth

EXAMPLE = Example("a", "temporal_grounding", "a.mp4", "A dog barks.", 30.0, IntervalTruth(((10.0, 14.0),)))
CONFIG = TaskConfig(think=False, grounding_answer="sentence")


@pytest.mark.parametrize(
    ("answer", "period"),
    [
        ("The event happens in 12.5 - 17.0 seconds.", (12.5, 17.0)),
        ("The event happens in 12.5-17 seconds", (12.5, 17.0)),
        ("it is 3 to 5.25, and again 8 - 9", (8.0, 9.0)),  # a dash goes before "to", wherever they stand
        ("FROM 3 TO 5", (3.0, 5.0)),
        ("between 3.5 and 7", (3.5, 7.0)),
        ("frames 2, 4 and 6", (2.0, 4.0)),
        ("0:05 - 1:10", (5.0, 70.0)),
        ("from 01:02:03 until 01:02:13, 5 - 6 s", (3723.0, 3733.0)),  # clock times before all else
        ("at 1:05, so 2 - 3", (2.0, 3.0)),  # one alone is no pair
        ("1 - 2 seconds, 3 - 4 seconds", (1.0, 2.0)),
        ("17 - 12", None),
        ("12 - 12", None),
        ("at 12 s", None),
        ("", None),
        ("<think>the first 5 s</think> 7 - 9", (7.0, 9.0)),
        ("00:05.5 - 00:10.25", (5.5, 10.25)),
        ("1:00:00.5 to 1:00:02", (3600.5, 3602.0)),
        ("1:02:03x, 1:05", (62.0, 65.0)),  # no word ends after the 03, so the clock ends before it
        ("00:05s - 00:10s", None),  # no clock times; what is left are the numbers 00 and 00
        ("from 5:10, 5:20 and 5:30", (310.0, 320.0)),
        ("12. - 17.", (12.0, 17.0)),
        ("1.2.3-5", (2.3, 5.0)),
        ("12.5s - 17.5s", (12.0, 17.0)),  # "5s" is no word, "12" before the point is
        ("3to5", None),
        ("3 to\t5", (3.0, 5.0)),
        ("12s until 17s", None),
        ("start: 0.8 seconds, end: 1.1 seconds", (0.8, 1.1)),
        ("[8, 19]", (8.0, 19.0)),
        ("-3 - 5", (3.0, 5.0)),
        ("2024-05 at 7 to 9", None),  # the first dash counts, and 2024 is not before 5
    ],
)
def test_what_is_read(answer: str, period):
    assert read_timelens(answer) == period


def test_reading_is_linear_in_the_text():
    ones = "1" * 60000
    for text in (ones, ones + "s", f"1:11.{ones}s", "1 " * 30000, "1:" * 30000, "1 -" + " " * 60000, "1.1" * 20000):
        began = time.process_time()
        read_timelens(text)
        assert time.process_time() - began < 1.0


def test_rewards_and_scores():
    task = make_tasks(CONFIG)["temporal_grounding"]
    assert isinstance(task, GroundingBySentence)
    answers = ["The event happens in 12.0 - 16.0 seconds.", "12 to 14", "The event happens in 9 - 8 seconds", "no"]
    parts = task.score([EXAMPLE] * 4, answers)
    assert parts["iou"] == [pytest.approx(2 / 6), 0.5, 0.0, 0.0]
    assert parts["format"] == [1.0, 0.0, 1.0, 0.0]
    scores = {"miou": pytest.approx((1 / 3 + 0.5) / 4), "r@0.3": 0.5, "r@0.5": 0.25, "r@0.7": 0.0}
    assert task.metrics([EXAMPLE] * 4, answers) == scores
    assert task.are_readable([EXAMPLE] * 4, answers) == [True, True, False, False]
    target = task.target(EXAMPLE)
    assert target == "The event happens in 10.0 - 14.0 seconds."
    assert task.score([EXAMPLE], [target]) == {"format": [1.0], "iou": [1.0]}
    assert "The event happens in <start> - <end> seconds." in task.question(EXAMPLE)
    assert read_answer(EXAMPLE, answers[0], CONFIG) == {"intervals": [[12.0, 16.0]]}
    assert read_answer(EXAMPLE, answers[3], CONFIG) is None


def test_there_is_no_think_block():
    with pytest.raises(ConfigError, match=r"set task\.think=false"):
        replace(CONFIG, think=True)
