"""Object tracking: truths, prompts, rewards and metrics of both recipes, with numbers computed by hand."""

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.types import Example, TrackTruth

FIXED = ObjectTracking(TaskConfig())
PAPER = ObjectTracking(TaskConfig(recipe="paper"))
FIXED_DIRECT = ObjectTracking(TaskConfig(think=False))

UNIT = "[0,0,1,1]"
HALF = "[0,0,0.5,1]"
WORDS = "['a','b','c','d']"


def example(num_boxes=8, box=(0.0, 0.0, 1.0, 1.0), **changes):
    truth = TrackTruth((box,) * num_boxes, tuple(0.5 * i for i in range(num_boxes)))
    return Example("e", "object_tracking", "/v.mp4", "red  square", 10.0, truth, **changes)


def wrap(*boxes):
    return f"<think>t</think><answer>[{','.join(boxes)}]</answer>"


def scored(task, answer, ex=None):
    parts = task.score([ex or example()], [answer])
    return parts["format"][0], parts["iou"][0]


def row(boxes, times_s, **extra):
    return {"boxes": boxes, "times_s": times_s, **extra}


@pytest.mark.parametrize(
    ("answer", "fixed", "paper"),
    [
        (wrap(*[UNIT] * 8), (1, 1), (1, 1)),
        (wrap(UNIT, *[HALF] * 7), (1, 0.5), (1, 4.5 / 8)),  # box 0 is given: it earns only in the paper
        (wrap(HALF, *[UNIT] * 7), (1, 1), (1, 7.5 / 8)),
        (wrap(*[UNIT] * 7), (0, 0), (0, 0)),
        (wrap(*[UNIT] * 9), (0, 0), (0, 0)),
        (wrap(UNIT, *["[1,1,0,0]"] * 7), (1, 0), (1, 1 / 8)),  # reversed boxes
        (wrap(*[WORDS] * 8), (0, 0), (1, 0)),  # strings earn the paper's format but no IoU
        (wrap(*[UNIT] * 7, WORDS), (0, 0), (1, 0)),
        (wrap(*[UNIT] * 7, "[0,0,1]"), (0, 0), (0, 0)),
        (wrap(*[UNIT] * 7, "[0,0,1e999,1]"), (0, 0), (1, 7 / 8)),  # no finiteness test in the original
        (wrap(*[UNIT] * 7, "[0,0,nan,1]"), (0, 0), (0, 0)),
        (wrap(*[UNIT] * 7, "[0,0,2,1]"), (1, 6.5 / 7), (1, 7.5 / 8)),  # beyond the picture
        (wrap(*[UNIT] * 8).replace(",[", ",\n["), (1, 1), (1, 1)),
        (wrap(*[UNIT] * 8).replace("0", "0\n"), (1, 1), (1, 1)),
        (f"<answer>[{','.join([UNIT] * 8)}]</answer>", (0, 1), (0, 1)),
        (wrap(*[UNIT] * 8) + "<answer>x</answer>", (0, 0), (1, 1)),  # the paper reads the first answer, fixed the last
        ("[" + ",".join([UNIT] * 8) + "]", (0, 0), (0, 0)),
        ("<think>t</think><answer>the box does not move</answer>", (0, 0), (0, 0)),
        ("", (0, 0), (0, 0)),
    ],
)
def test_rewards(answer, fixed, paper):
    assert scored(FIXED, answer) == fixed
    assert scored(PAPER, answer) == paper


def test_a_newline_inside_a_number_is_joined_in_the_paper_only():
    answer = wrap(*[UNIT] * 7, "[0,0,0.\n5,1]")
    assert scored(PAPER, answer) == (1, 7.5 / 8)
    assert scored(FIXED, answer) == (0, 0)


def test_the_number_of_boxes_is_that_of_the_truth():
    assert scored(FIXED, wrap(UNIT, HALF, UNIT), example(3)) == (1, 0.75)
    assert scored(FIXED, wrap(*[UNIT] * 8), example(3)) == (0, 0)
    assert scored(FIXED_DIRECT, "<answer>[[0,0,1,1],[0,0,0.5,1]]</answer>", example(2)) == (1, 0.5)


def test_a_batch_scores_each_answer_against_its_own_truth():
    parts = FIXED.score([example(2), example(3), example(2)], [wrap(UNIT, HALF), wrap(*[UNIT] * 3), "x"])
    assert parts == {"format": [1.0, 1.0, 0.0], "iou": [0.5, 1.0, 0.0]}


BOX = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row([BOX, BOX], [0.0]), "there are 2 boxes but 1 times_s, wanted one instant per box"),
        (row([BOX], [0.0]), "there is 1 box, wanted at least 2"),
        (row([BOX, [0.3, 0.2, 0.1, 0.4]], [0, 1]), r"box 1 is \[0.3, 0.2, 0.1, 0.4\], wanted x0 < x1 and y0 < y1"),
        (row([BOX, [0.1, 0.4, 0.3, 0.4]], [0, 1]), "wanted x0 < x1 and y0 < y1"),
        (row([BOX, [0.1, 0.2, 1.3, 0.4]], [0, 1]), "wanted corners between 0 and 1"),
        (row([BOX, [-0.1, 0.2, 0.3, 0.4]], [0, 1]), "wanted corners between 0 and 1"),
        (row([BOX, [0.1, 0.2, 0.3, float("nan")]], [0, 1]), r"box 1\[3\] is nan, wanted a finite number"),
        (row([BOX, [0.1, 0.2, 0.3]], [0, 1]), "box 1 is .*, wanted a list of 4 numbers"),
        (row([BOX, BOX], [1.0, 1.0]), r"times_s\[1\] is 1.0, wanted 0 or more and after the instant before it"),
        (row([BOX, BOX], [-1.0, 1.0]), r"times_s\[0\] is -1.0"),
        (row([BOX, BOX], [0.0, 11.0], duration_s=10), r"times_s\[1\] is 11.0 s, but the video ends at 10.0 s"),
        (row([BOX, BOX], None), "times_s is None, wanted a list of numbers"),
        ({"times_s": [0.0]}, "boxes is missing"),
    ],
)
def test_broken_ground_truths_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        FIXED.parse_truth(bad)


def test_good_ground_truths():
    truth = FIXED.parse_truth(row([BOX, [0, 0, 1, 1]], [0, 1.5], duration_s=1.5))
    assert truth == TrackTruth(((0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 1.0)), (0.0, 1.5))
    odd = [0.9, 0.2, 0.3, 0.4]
    assert PAPER.parse_truth(row([odd] * 8, list(range(8)))).boxes == (tuple(odd),) * 8  # kept as it is
    with pytest.raises(ValueError, match="there are 2 boxes, wanted 8"):
        PAPER.parse_truth(row([BOX, BOX], [0, 1]))


def test_prompts_say_what_is_wanted():
    ex = example(3, box=(0.12, 0.3, 0.4, 0.551))
    question = FIXED.question(ex)
    assert "red square" in question
    assert "At 0.00 s its box is [0.12,0.30,0.40,0.55]" in question
    assert "0.00, 0.50, 1.00 s" in question
    assert "list of 3" in question
    assert len(question) < 300
    paper = PAPER.question(example(box=(0.093, 0.0, 0.8, 0.797)))
    assert "[0.093, 0.0, 0.8, 0.797]" in paper  # Python's own list text, as the original has it
    assert "list of 8" in paper
    assert "0.50" not in paper  # instants are not told


def test_targets_earn_the_full_reward():
    ex = example(2, box=(0.125, 0.3, 0.4, 1.0), reasoning="r")
    assert FIXED.target(ex) == "<think>r</think><answer>[[0.12,0.30,0.40,1.00],[0.12,0.30,0.40,1.00]]</answer>"
    assert FIXED_DIRECT.target(ex) == "<answer>[[0.12,0.30,0.40,1.00],[0.12,0.30,0.40,1.00]]</answer>"
    assert scored(FIXED, FIXED.target(example(5)), example(5)) == (1, 1)
    assert scored(PAPER, PAPER.target(example())) == (1, 1)


def test_metrics():
    answers = [wrap(*[UNIT] * 8), wrap(UNIT, *[HALF] * 7), "no"]  # without box 0: 1, 0.5, 0; with it: 1, 4.5 / 8, 0
    fixed, paper = FIXED.metrics([example()] * 3, answers), PAPER.metrics([example()] * 3, answers)
    without = {"mean_overlap": 0.5, "r@0.5": 2 / 3, "r@0.7": 1 / 3}
    with_first = {"mean_overlap_with_first": 12.5 / 24, "r@0.5_with_first": 2 / 3, "r@0.7_with_first": 1 / 3}
    # over 21 boxes: 7 of overlap 1, 7 of 0.5, which does not exceed 0.5, 7 of an answer that cannot be read
    success = {"ao": 0.5, "sr@0.5": 7 / 21, "sr@0.75": 7 / 21}
    assert list(fixed.items()) == [*without.items(), *with_first.items(), *success.items()]
    assert list(paper.items()) == [*with_first.items(), *without.items(), *success.items()]  # only the headline differs
    almost = [wrap(UNIT, *[UNIT] * 3, *["[2,2,3,3]"] * 4)]  # without box 0: 3 / 7; with it: 4 / 8
    for task in (FIXED, PAPER):
        metrics = task.metrics([example()], almost)
        assert (metrics["r@0.5"], metrics["r@0.5_with_first"]) == (0.0, 1.0)


def test_repeating_the_first_box():
    ex = Example(
        "e",
        "object_tracking",
        "/v.mp4",
        "q",
        9.0,
        TrackTruth(((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.25, 1.0)), (0.0, 1.0, 2.0)),
    )
    answers = FIXED.trivial_answers([ex])
    assert answers["repeat_first_box"][0].count("[0.0000,0.0000,1.0000,1.0000]") == 3
    assert FIXED.metrics([ex], answers["repeat_first_box"])["mean_overlap"] == 0.375
