"""What the benchmarks' own scripts read out of odd answers; each value worked out by hand from their rule."""

import time
from string import ascii_uppercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.benchmark_readers import (
    CHOICE_RULES,
    read_boxes,
    read_caption,
    read_evidence,
    read_label,
    read_letter,
    read_period,
)
from vcr1_fast.tasks.multiple_choice import MultipleChoice
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.tasks.video_quality import VideoQuality
from vcr1_fast.types import Example, IntervalTruth, LabelTruth

OPTIONS = ("a cat", "a dog", "a car", "a ball")
BOX = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("output", "period"),
    [
        ("The event happens from 3.0 to 5.0 seconds.", (3.0, 5.0)),
        ("<answer>3.0 to 5.0</answer>", (3.0, 5.0)),
        ("<think>0 to 1</think><answer>3.0 to 5.0</answer>", (3.0, 5.0)),
        ("<answer>3 to 5</answer> and surely not 8 to 9", (3.0, 5.0)),  # the tag goes first
        ("<answer>1 to 2</answer><answer>3 to 5</answer>", (3.0, 5.0)),
        ("<think>3.0 to 5.0</think><answer>I cannot tell</answer>", (3.0, 5.0)),  # the script looks everywhere
        ("<think>from 1 to 2, or from 3 and 5", (3.0, 5.0)),  # cut off
        ("between 3 and 5", (3.0, 5.0)),
        ("1 to 2, then 3. to 5", (3.0, 5.0)),  # the last one
        ("5 to 3", (5.0, 3.0)),  # order not checked, see the metric
        ("from -3 to 5", (3.0, 5.0)),  # no sign
        ("0:03 to 0:05", (3.0, 0.0)),  # no clock
        ("0 to 9999", (0.0, 9999.0)),
        ("3 To 5", None),  # the reward ignores the case, the evaluation does not
        ("3.0s to 5.0s", None),
        ("3  to 5", None),
        ("3\nto 5", None),
        ("[3.0, 5.0]", None),
        ("", None),
    ],
)
def test_periods(output, period):
    assert read_period(output) == period


def test_the_sentence_of_a_model_before_training_has_its_published_iou():
    """3.0 to 5.0 s of a true 3.3 to 5.8: 1.7 s shared, 2.8 in all, 60.71 %."""
    ex = Example("e", "temporal_grounding", "v.mp4", "q", 30.0, IntervalTruth(((3.3, 5.8),)))
    for recipe in ("fixed", "paper"):
        task = TemporalGrounding(TaskConfig(recipe=recipe))
        for answer in ("The event happens from 3.0 to 5.0 seconds.", "<answer>3.0 to 5.0</answer>"):
            assert round(100 * task.metrics([ex], [answer])["miou"], 2) == 60.71


@pytest.mark.parametrize(
    ("output", "videomme", "perception_test", "mvbench", "videochat_r1"),
    [
        ("C", "C", "C", "C", "C"),
        ("(C)", "C", "C", "C", "C"),
        ("The best answer is C", "C", "C", "C", "C"),
        ("<answer>C</answer>", "C", "C", "C", "C"),
        ("<think>A or B?</think>\nC", "C", "C", "C", "C"),
        ("<think>A or B?</think><answer>(C) a car</answer> D", "C", "C", "C", "C"),
        ("A or B?</think>C", "C", "C", "C", "C"),  # the prompt opened the think block
        ("<think>A or B?", None, None, None, None),  # cut off
        ("c", None, None, "C", None),
        ("C. a car", "C", "C", "C", "C"),
        ("C.a car", "C", "C", "C", "C"),
        ("It is a car: (C).", "C", "C", "A", "C"),  # the article
        ("Because of C", "B", "C", "C", "B"),
        ("Best answer: C", "B", "C", "C", "B"),
        ("Best answer:Best option:C", "C", "C", "C", "C"),  # taken out as one phrase; as words, : parts them
        ("It costs 1,000, C-", "C", "C", "C", "C"),
        ("option_C", "C", None, "C", "C"),  # an underscore is of the word, unless it becomes a blank
        ("Either E or C", "C", "C", "E", "E"),  # no E in the first two
        ("Generally (C)", "C", "C", "C", "G"),
        ("a car", None, None, "A", None),
        ("I see nothing", None, None, None, None),
        ("", None, None, None, None),
        ("C <glue>[(1, 2)]</glue>", "C", "C", "C", "C"),
    ],
)
def test_letters(output, videomme, perception_test, mvbench, videochat_r1):
    wanted = {
        "videomme": videomme,
        "perception_test": perception_test,
        "mvbench": mvbench,
        "videochat_r1": videochat_r1,
    }
    assert {rule: read_letter(output, OPTIONS, rule) for rule in wanted} == wanted


@pytest.mark.parametrize(
    ("output", "longvideobench", "mlvu", "vsibench"),
    [
        ("C", "C", "C", "C"),
        ("c", None, None, "C"),
        ("(C)", "C", "C", None),
        ("C) a cat", "C", "C", None),
        ("C. A cat", "C", None, "C"),
        ("C.", "C", None, "C"),
        ("<answer>\nD\n</answer>", "D", "D", "D"),
        ("Best option: (B) a dog", "B", "B", None),
        ("The best answer is C", "C", None, None),
        ("Because it is a dog", "B", None, None),
        ("a cat", None, None, "A"),
        ("It (the dog) is B", "B", None, None),
        ("", None, None, None),
        ("<think>A</think>", None, None, None),
    ],
)
def test_letters_of_further_benchmarks(output, longvideobench, mlvu, vsibench):
    wanted = {"longvideobench": longvideobench, "mlvu": mlvu, "vsibench": vsibench}
    assert {rule: read_letter(output, OPTIONS, rule) for rule in wanted} == wanted


def test_letters_beyond_the_benchmarks_count_where_there_are_such_options():
    assert read_letter("E", OPTIONS, "videomme") is None
    assert read_letter("E", (*OPTIONS, "a tree"), "videomme") == "E"
    assert read_letter("D", OPTIONS[:2], "videomme") == "D"  # wrong, and no reason to look further


def test_a_row_names_its_rule():
    task = MultipleChoice(TaskConfig())
    row = {"options": list(OPTIONS), "answer": "C"}
    plain, mvbench = task.parse_truth(row), task.parse_truth(row | {"scoring": "mvbench"})
    assert (plain.scoring, mvbench.scoring) == ("videomme", "mvbench")
    asked = [Example("e", task.name, "v.mp4", "q", 8.0, truth) for truth in (plain, mvbench)]
    for ex, acc in zip(asked, (0.0, 1.0), strict=True):
        assert task.metrics([ex], ["c"]) == {"acc": acc}
        assert task.are_readable([ex], ["c"]) == [acc == 1.0]
    with pytest.raises(ValueError, match=r"scoring is 'mvbnch', wanted one of videomme, mvbench, "):
        task.parse_truth(row | {"scoring": "mvbnch"})
    with pytest.raises(ValueError, match="scoring is 3, wanted one of"):
        task.parse_truth(row | {"scoring": 3})


@pytest.mark.parametrize(
    ("output", "boxes"),
    [
        (f"<answer>[{BOX}, {BOX}]</answer>", 2),
        (f"[{BOX}]", 1),
        (f"<think>[[0, 0, 1, 1]]</think>[{BOX}]", 1),
        (f"```json\n[{BOX}, {BOX}]\n```", 2),
        (f"Here they are:\n```\n[{BOX}]\n```\nDone.", 1),
        (f"<answer>\n```json\n[\n  {BOX},\n  {BOX}\n]\n```\n</answer>", 2),
        (f"```json\n[{BOX}]", 1),  # cut off after the list
        (f"<answer>[{BOX}]</answer><answer>[{BOX}, {BOX}]</answer>", 1),  # the first block
        (f"[{BOX},]", 1),
        (f"Here they are: [{BOX}]", None),
        (f"[{BOX}, [0.1, 0.2, 0.3]]", None),
        (f"[{BOX}, ['a', 0.2, 0.3, 0.4]]", None),
        (f"[{BOX}, [1e999, 0.2, 0.3, 0.4]]", None),
        (f"[{BOX}, [None, 0.2, 0.3, 0.4]]", None),
        (str(BOX), None),
        ("[]", None),
        ("", None),
    ],
)
def test_boxes(output, boxes):
    assert read_boxes(output) == (None if boxes is None else [tuple(BOX)] * boxes)


@pytest.mark.parametrize(
    ("output", "intervals"),
    [
        ("<answer>A</answer><glue>[(5.2, 10.4)]</glue>", [(5.2, 10.4)]),
        ("<glue>[(1, 2), (3, 4)]</glue>", [(1.0, 2.0), (3.0, 4.0)]),
        ("<think>hm</think><answer>A</answer>\n[(1, 2)]\n", [(1.0, 2.0)]),  # without the tag
        ("<glue>[(1, 2)]</glue><glue>[(3, 4)]</glue>", [(1.0, 2.0)]),
        ("<think><glue>[(1, 2)]</glue></think><glue>[(3, 4)]</glue>", [(1.0, 2.0)]),  # the script takes the first
        ("<glue>[]</glue>", []),
        ("<glue>```json\n[[1, 2.5], [3, 4]]\n```</glue>", [(1.0, 2.5), (3.0, 4.0)]),
        ("<glue>\n```json\n[\n  [1, 2]\n]\n```\n</glue>", [(1.0, 2.0)]),
        ("<answer>A</answer>```\n[(1, 2)]\n```", [(1.0, 2.0)]),
        ("<glue>[(0, 300)]</glue>", [(0.0, 300.0)]),
        ("<glue>[[1, 2]]</glue>", None),  # JSON in a fence only
        ("<glue>[(2, 1)]</glue>", None),
        ("<glue>```[[2, 1]]```</glue>", None),
        ("<glue>```[[-1, 1]]```</glue>", None),
        ("<glue>```[[1, 2, 3]]```</glue>", None),
        ("<glue> [(1, 2)]</glue>", None),  # the script's pattern begins with the bracket
        ("<glue>(1, 2)</glue>", None),
        ("<glue>[(1.5 s, 2 s)]</glue>", None),
        ("It shows at [(1, 2)]", None),
        ("<answer>A</answer>", None),
        ("", None),
    ],
)
def test_evidence(output, intervals):
    assert read_evidence(output) == intervals


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("<think>t</think><answer> Low Quality\n</answer>", "low quality"),
        ("Low quality", "low quality"),
        ("<think>high quality?</think>\nlow quality\n", "low quality"),
        ("<answer>low quality</answer><answer>high quality</answer>", "low quality"),
        ("low quality.", "low quality."),  # equality, as the script has it: wrong
        ("The video has low quality", "the video has low quality"),
        ("<answer></answer>", None),
        ("<think>low quality", None),
        (" \n", None),
        ("", None),
    ],
)
def test_labels(output, label):
    assert read_label(output) == label


def test_a_label_is_readable_where_it_is_one_of_those_there_are():
    task = VideoQuality(TaskConfig())
    truth = LabelTruth("low quality", ("low quality", "high quality"))
    ex = Example("e", task.name, "v.mp4", "q", 8.0, truth)
    said = ["Low quality", "high quality", "low quality.", "", "<answer>low quality</answer>"]
    assert task.are_readable([ex] * 5, said) == [True, True, False, False, True]
    assert task.metrics([ex] * 5, said) == {"acc": 2 / 5}
    unknown = Example("e", task.name, "v.mp4", "q", 8.0, LabelTruth("low quality"))
    assert task.are_readable([unknown] * 2, ["low quality.", ""]) == [True, False]


def test_captions():
    assert read_caption("<think>t</think> A dog barks. ") == "A dog barks."
    assert read_caption("<answer>A dog.</answer> x <answer>A cat.</answer>") == "A cat."
    assert read_caption("A dog <think>barks") == "A dog"
    assert [read_caption(text) for text in ("", "<answer>?!</answer> A dog", "<think>A dog")] == [""] * 3


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<glue>",
    "</glue>",
    "```",
    "json",
    "[[",
    "1",
    ",",
    " to ",
    ")]",
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(max_size=40))
def test_nothing_raises(text):
    for read in (read_period, read_boxes, read_evidence, read_label, read_caption):
        read(text)
    for rule in CHOICE_RULES:
        assert read_letter(text, OPTIONS, rule) in {None, *ascii_uppercase}


@pytest.mark.parametrize("piece", ["```", "<think>", "[", "1 to ", "(1, ", "C. ", "<answer>", "1,"])
def test_time_is_linear_in_the_text(piece):
    text = piece * (400_000 // len(piece))
    began = time.process_time()
    for read in (read_period, read_boxes, read_evidence, read_label, read_caption):
        read(text)
    for rule in CHOICE_RULES:
        read_letter(text.lower(), OPTIONS, rule)
    assert time.process_time() - began < 3.0  # 0.5 s; one that grows with the square takes minutes
