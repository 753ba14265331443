"""Temporal grounding: truths, prompts, rewards and metrics of both recipes, with numbers computed by hand."""

import dataclasses

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.types import Example, IntervalTruth

FIXED = TemporalGrounding(TaskConfig())
PAPER = TemporalGrounding(TaskConfig(recipe="paper"))
FIXED_DIRECT = TemporalGrounding(TaskConfig(think=False))
PAPER_DIRECT = TemporalGrounding(TaskConfig(recipe="paper", think=False))


def example(*intervals_s, duration_s=30.0, **changes):
    truth = IntervalTruth(intervals_s or ((2.0, 6.0),))
    return Example("e", "temporal_grounding", "/v.mp4", "A person opens a door.", duration_s, truth, **changes)


def scored(task, answer, ex=None):
    parts = task.score([ex or example()], [answer])
    return parts["format"][0], parts["iou"][0]


def wrap(answer):
    return f"<think>t</think><answer>{answer}</answer>"


def row(*intervals, **extra):
    return {"intervals": [list(interval) for interval in intervals], **extra}


@pytest.mark.parametrize(
    ("answer", "fixed", "paper"),
    [
        (wrap("4 to 10"), (1, 2 / 8), (1, 2 / 8)),  # truth 2 to 6
        (wrap("2.00 to 6.00"), (1, 1), (1, 1)),
        (wrap("8 to 9"), (1, 0), (1, 0)),
        (wrap("6 to 2"), (1, 0), (1, 0)),  # reversed
        (wrap("2s to 6 s"), (1, 1), (1, 0)),  # a unit letter cannot be read by the original
        (wrap("-2 to 6"), (1, 4 / 8), (1, 1)),  # the original drops the sign
        (wrap("2 to 90"), (1, 4 / 88), (1, 4 / 88)),  # not cut to the 30 s of the video
        (wrap("2 to 31"), (1, 4 / 28), (1, 4 / 29)),  # but for one step of the model's time axis, 1 s
        (wrap("2 to 31.01"), (1, 4 / 29.01), (1, 4 / 29.01)),
        (wrap("30.5 to 31"), (1, 0), (1, 0)),
        (wrap("40 to 50"), (1, 0), (1, 0)),
        (wrap("2  to 6"), (1, 1), (1, 0)),
        (wrap("no idea"), (0, 0), (1, 0)),  # the original's format looks at the tags alone
        (wrap("1e400 to 3"), (0, 0), (1, 0)),
        ("2 to 6", (0, 0), (0, 0)),  # no tag
        ("<answer>2 to 6</answer>", (0, 1), (0, 1)),  # no think block
        (wrap("2 to 6") + "<answer>8 to 9</answer>", (0, 0), (1, 0)),  # the last answer counts; repeated tags
        ("<think><answer>8 to 9</answer></think><answer>2 to 6</answer>", (0, 1), (1, 1)),
        (wrap("8 to 9 or rather 2 and 6"), (1, 1), (1, 1)),  # the last period counts
        ("", (0, 0), (0, 0)),
        ("<think>2 to 6", (0, 0), (0, 0)),  # cut off
    ],
)
def test_rewards(answer, fixed, paper):
    assert scored(FIXED, answer) == fixed
    assert scored(PAPER, answer) == paper


def test_rewards_without_think_block():
    for task in (FIXED_DIRECT, PAPER_DIRECT):
        assert scored(task, "<answer>2 to 6</answer>") == (1, 1)
        assert scored(task, wrap("2 to 6")) == (0, 1)
    assert scored(FIXED_DIRECT, "<answer>2 to 6</answer><answer>2 to 6</answer>") == (0, 1)
    assert scored(PAPER_DIRECT, "<answer>2 to 6</answer><answer>2 to 6</answer>") == (1, 1)


def test_reversed_ground_truth_of_the_paper():
    reversed_row = example((20.9, 12.0))
    assert scored(PAPER, wrap("12.0 to 20.9"), reversed_row) == (1, 0)
    assert scored(PAPER, wrap("15 to 16"), reversed_row) == (1, 0)
    assert scored(PAPER, wrap("15 to 15"), reversed_row) == (1, 1)  # denominator max(12, 15) - min(20.9, 15) = 0


def test_several_true_intervals_are_a_set():
    ex = example((2.0, 4.0), (8.0, 10.0))
    assert scored(FIXED, wrap("2 to 10"), ex) == (1, 4 / 8)
    assert scored(FIXED, wrap("3 to 9"), ex) == (1, 2 / 8)  # shared 1 + 1, union 2 to 10 is 8


def test_a_batch_scores_each_answer_against_its_own_truth():
    parts = FIXED.score([example((0.0, 2.0)), example((4.0, 8.0)), example()], [wrap("0 to 1"), wrap("4 to 8"), "x"])
    assert parts == {"format": [1.0, 1.0, 0.0], "iou": [0.5, 1.0, 0.0]}
    assert tuple(parts) == FIXED.part_names


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row((20.9, 12.0)), r"^interval 0 ends \(12.0 s\) before it starts \(20.9 s\)$"),
        (row((1, 2), (3, 3)), "interval 1 is empty: it starts and ends at 3.0 s"),
        (row((-1, 2)), "interval 0 starts at -1.0 s, wanted 0 s or later"),
        (row((31, 35), duration_s=30), "interval 0 starts at 31.0 s, but the video ends at 30.0 s"),
        (row((30, 35), duration_s=30), "interval 0 starts at 30.0 s, but the video ends at 30.0 s"),
        (row((1, float("inf"))), r"interval 0\[1\] is inf, wanted a finite number"),
        (row((float("nan"), 2)), r"interval 0\[0\] is nan, wanted a finite number"),
        (row((1, 10**400)), r"interval 0\[1\] is inf, wanted a finite number"),
        (row((1, 2, 3)), r"interval 0 is \[1, 2, 3\], wanted a list of 2 numbers"),
        (row(("1", 2)), r"interval 0\[0\] is '1', wanted a number"),
        (row((True, 2)), r"interval 0\[0\] is True, wanted a number"),
        (row(), r"intervals is \[\], wanted a list of lists of 2 numbers, at least one"),
        ({}, "intervals is missing"),
        (row((1, 2), duration_s=0), "duration_s is 0.0, wanted more than 0 seconds"),
        (row((1, 2), duration_s="long"), "duration_s is 'long', wanted a number"),
    ],
)
def test_broken_ground_truths_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        FIXED.parse_truth(bad)


def test_good_ground_truths():
    assert FIXED.parse_truth(row((1, 2.5))) == IntervalTruth(((1.0, 2.5),))
    assert FIXED.parse_truth(row((1, 2), (24.3, 31.5), duration_s=30)) == IntervalTruth(((1.0, 2.0), (24.3, 30.0)))
    assert PAPER.parse_truth(row((20.9, 12.0), duration_s=15)) == IntervalTruth(((20.9, 12.0),))
    with pytest.raises(ValueError, match="finite"):
        PAPER.parse_truth(row((1, float("inf"))))


def test_prompts_say_what_is_wanted():
    assert "A person opens a door?" in FIXED.question(example())
    assert "a person opens a door" in PAPER.question(example())  # the original lower-cases the query
    for task in (FIXED, PAPER):
        question = task.question(example())
        assert all(word in question for word in ("seconds", "two decimals", "X to Y"))
    assert len(FIXED.question(example())) < 200  # the tiny model pays for every token


def test_targets_earn_the_full_reward():
    ex = example((1.0, 2.0), (4.256, 8.0), reasoning="0 no 4 yes")
    assert FIXED.target(ex) == "<think>0 no 4 yes</think><answer>4.26 to 8.00</answer>"
    assert FIXED_DIRECT.target(ex) == "<answer>4.26 to 8.00</answer>"
    for task in (FIXED, PAPER, FIXED_DIRECT, PAPER_DIRECT):
        assert scored(task, task.target(example())) == (1, 1)


@pytest.mark.parametrize("task", [FIXED, PAPER])
def test_of_several_true_intervals_the_best_counts(task):
    ex = example((2.0, 6.0), (10.0, 20.0))
    metrics = task.metrics([ex, ex], [wrap("10 to 18"), wrap("2 to 10")])  # 8 / 10; 4 / 8, not 4 / 18 of the union
    assert metrics == {"miou": (0.8 + 0.5) / 2, "r@0.3": 1.0, "r@0.5": 1.0, "r@0.7": 0.5}
    assert FIXED.score([ex], [wrap("2 to 10")])["iou"] == [4 / 18]  # the reward asks for all of them


def test_metrics_keep_failures_in_the_denominator():
    answers = [wrap("2 to 6"), wrap("2 to 4"), wrap("2 to 3"), "no"]  # IoU 1, 0.5, 0.25, 0
    metrics = FIXED.metrics([example()] * 4, answers)
    assert metrics == {"miou": 1.75 / 4, "r@0.3": 0.5, "r@0.5": 0.5, "r@0.7": 0.25}
    assert next(iter(metrics)) == "miou"


def test_scores_are_the_benchmarks_whatever_the_recipe():
    """The truth is 24.3 to 30.4 s of a video of 30 s; the paper keeps its end, the fixed recipe repairs it to 30."""
    row = {"intervals": [[24.3, 30.4]], "duration_s": 30.0}
    said = {
        "The event happens from 3.0 to 5.0 seconds.": (0, True),
        "The event happens from 24.3 to 27.35 seconds.": (3.05, True),
        "<think>0 to 1</think> 24.3 and 27.35, I think": (3.05, True),
        wrap("24.3 to 9999"): (None, True),
        wrap("27.35 to 24.3"): (0, True),
        wrap("24.3s to 27.35s"): (0, False),
        "": (0, False),
    }
    for task, length_s in ((FIXED, 5.7), (PAPER, 6.1)):
        ex = dataclasses.replace(example(), truth=task.parse_truth(row))
        for answer, (shared_s, is_readable) in said.items():
            wanted = length_s / (9999 - 24.3) if shared_s is None else shared_s / length_s
            assert task.metrics([ex], [answer])["miou"] == pytest.approx(wanted), answer
            assert task.are_readable([ex], [answer]) == [is_readable]


def test_trivial_answers():
    examples = [example((0.0, 5.0), duration_s=10.0), example((0.0, 10.0), duration_s=20.0)]
    answers = FIXED.trivial_answers(examples)
    assert answers["whole_video"] == [
        "<think></think><answer>0.00 to 10.00</answer>",
        "<think></think><answer>0.00 to 20.00</answer>",
    ]
    assert FIXED.best_constant(examples) == (0.0, 0.5)
    assert FIXED.metrics(examples, answers["best_constant"])["miou"] == 1.0
    assert FIXED.metrics(examples, answers["whole_video"])["miou"] == 0.5
    assert FIXED_DIRECT.trivial_answers(examples)["whole_video"][0] == "<answer>0.00 to 10.00</answer>"
