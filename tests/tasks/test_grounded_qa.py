"""Grounded question answering: truths, prompts, rewards and metrics of both recipes, with numbers computed by hand."""

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.grounded_qa import GroundedQA, inside_video, segment_overlap
from vcr1_fast.types import Example, GroundedChoiceTruth

FIXED = GroundedQA(TaskConfig())
PAPER = GroundedQA(TaskConfig(recipe="paper"))
FIXED_DIRECT = GroundedQA(TaskConfig(think=False))
PAPER_DIRECT = GroundedQA(TaskConfig(recipe="paper", think=False))
ALL = (FIXED, PAPER, FIXED_DIRECT, PAPER_DIRECT)
OPTIONS = ("share with the girl", "approach the lady", "unwrap it", "play with a toy train", "gesture something")


def example(*intervals_s, letter="C", duration_s=30.0, **changes):
    truth = GroundedChoiceTruth(letter, OPTIONS, intervals_s or ((2.0, 6.0),))
    return Example("e", "grounded_qa", "/v.mp4", "what did the boy do", duration_s, truth, **changes)


def scored(task, answer, ex=None):
    parts = task.score([ex or example()], [answer])
    return parts["format"][0], parts["iou"][0], parts["accuracy"][0]


def wrap(letter, glue):
    return f"<think>t</think><answer>{letter}</answer><glue>{glue}</glue>"


@pytest.mark.parametrize(
    ("answer", "fixed", "paper"),
    [
        (wrap("C", "[(2, 6)]"), (1, 1, 1), (1, 1, 1)),  # truth 2 to 6
        (wrap("C", "[(4, 10)]"), (1, 2 / 8, 1), (1, 2 / 8, 1)),
        (wrap("B", "[(2.00, 6.00)]"), (1, 1, 0), (1, 1, 0)),
        (wrap("C", "[(2, 3), (5, 6)]"), (1, 2 / 4, 1), (1, 2 / 4, 1)),
        (wrap("C", "[(5, 6), (2, 4), (3, 5)]"), (1, 1, 1), (1, 1, 1)),  # any order, overlaps merged
        (wrap("C", "[(2, 6), (8, 12)]"), (1, 4 / 8, 1), (1, 4 / 8, 1)),
        (wrap("C", "[(8, 9)]"), (1, 0, 1), (1, 0, 1)),
        (wrap("C", "[(2, 90)]"), (1, 4 / 88, 1), (1, 4 / 88, 1)),  # not cut to the 30 s of the video
        (wrap("C", "[(2, 31)]"), (1, 4 / 28, 1), (1, 4 / 29, 1)),  # but for one step of the model's time axis
        (wrap("C", "[(40, 50)]"), (1, 0, 1), (1, 0, 1)),
        (wrap("C", "[(3, 3)]"), (1, 0, 1), (1, 0, 1)),
        (wrap("C", "[]"), (0, 0, 1), (1, 0, 1)),  # the empty list is valid for the original
        (wrap("C", "[(6, 2)]"), (0, 0, 1), (0, 0, 1)),  # reversed
        (wrap("C", "[(2, 6), (9, 8)]"), (0, 0, 1), (0, 0, 1)),  # one bad pair spoils the list
        (wrap("C", "[[2, 6]]"), (1, 1, 1), (0, 0, 1)),
        (wrap("C", "(2, 6)"), (1, 1, 1), (0, 0, 1)),
        (wrap("C", "[ (2, 6) ]"), (1, 1, 1), (0, 0, 1)),
        (wrap("C", "[(-2, 6)]"), (1, 4 / 8, 1), (0, 0, 1)),
        (wrap("C", "[(02, 6)]"), (1, 1, 1), (0, 0, 1)),
        (wrap("C", "[(2, 6)]\n"), (1, 1, 1), (1, 1, 1)),
        (wrap("C", "[(2, 6),]"), (1, 1, 1), (1, 1, 1)),
        (wrap("C", "[(2, " + "9" * 400 + ")]"), (0, 0, 1), (1, 0, 1)),  # 4 of infinitely many seconds
        (wrap("C", "[(" + "9" * 400 + ", " + "9" * 400 + ")]"), (0, 0, 1), (1, 0, 1)),
        (wrap("C", "2 to 6"), (0, 0, 1), (0, 0, 1)),
        (wrap("C", "no idea"), (0, 0, 1), (0, 0, 1)),
        (wrap("Because he did", "[(2, 6)]"), (0, 1, 0), (1, 1, 0)),
        (wrap("Clearly", "[(2, 6)]"), (0, 1, 0), (1, 1, 1)),  # its first capital from A to G
        (wrap("C or D", "[(2, 6)]"), (0, 1, 0), (1, 1, 1)),
        (wrap("c", "[(2, 6)]"), (1, 1, 1), (1, 1, 0)),
        (wrap("", ""), (0, 0, 0), (0, 0, 0)),
        ("<think>t</think>\n<answer>C</answer>\n<glue>[(2, 6)]</glue>\n", (1, 1, 1), (1, 1, 1)),
        ("<answer>C</answer><glue>[(2, 6)]</glue>", (0, 1, 1), (0, 1, 1)),  # no think block
        ("<think>t</think><glue>[(2, 6)]</glue><answer>C</answer>", (0, 1, 1), (0, 1, 1)),  # the other order
        ("<think>t</think><answer>C</answer>", (0, 0, 1), (0, 0, 1)),
        ("<think>t</think><answer>C</answer><glue>[(2, 6)]", (0, 0, 1), (0, 0, 1)),  # cut off
        (wrap("C", "[(2, 6)]</glue><glue>[(8, 9)]"), (0, 0, 1), (1, 1, 1)),  # the last block, the first block
        (wrap("C", "x</glue><glue>[(2, 6)]"), (0, 1, 1), (0, 0, 1)),
        ("<think><answer>D</answer><glue>[]</glue></think>" + wrap("C", "[(2, 6)]")[16:], (0, 1, 1), (1, 0, 0)),
        ("", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_rewards(answer, fixed, paper):
    assert scored(FIXED, answer) == fixed
    assert scored(PAPER, answer) == paper


def test_rewards_without_think_block():
    for task in (FIXED_DIRECT, PAPER_DIRECT):
        assert scored(task, "<answer>C</answer> <glue>[(2, 6)]</glue>") == (1, 1, 1)
        assert scored(task, wrap("C", "[(2, 6)]")) == (0, 1, 1)


def test_several_true_intervals_are_a_set():
    ex = example((2.0, 4.0), (8.0, 10.0))
    for task in (FIXED, PAPER):
        assert scored(task, wrap("C", "[(2, 10)]"), ex) == (1, 4 / 8, 1)
        assert scored(task, wrap("C", "[(8, 10), (2, 4)]"), ex) == (1, 1, 1)
        assert scored(task, wrap("C", "[(3, 9)]"), ex) == (1, 2 / 8, 1)  # shared 1 + 1, union 2 to 10


def test_a_union_without_length_is_1_for_the_original():
    instant = example((5.0, 5.0))
    assert scored(PAPER, wrap("C", "[]"), instant) == (1, 1, 1)
    assert scored(PAPER, wrap("C", "[(3, 3)]"), instant) == (1, 1, 1)
    assert scored(PAPER, wrap("C", "[(5, 6)]"), instant) == (1, 0, 1)
    assert scored(PAPER, wrap("C", "[(6, 5)]"), instant) == (0, 0, 1)  # invalid stays 0
    assert scored(PAPER, "", instant) == (0, 0, 0)
    assert scored(FIXED, wrap("C", "[(3, 3)]"), instant) == (1, 0, 1)


def test_a_batch_scores_each_answer_against_its_own_truth():
    examples = [example((0.0, 2.0)), example((4.0, 8.0), letter="A"), example()]
    parts = FIXED.score(examples, [wrap("C", "[(0, 1)]"), wrap("A", "[(4, 8)]"), "x"])
    assert parts == {"format": [1.0, 1.0, 0.0], "iou": [0.5, 1.0, 0.0], "accuracy": [1.0, 1.0, 0.0]}
    assert tuple(parts) == FIXED.part_names


def row(*intervals, **extra):
    return {"options": list(OPTIONS), "answer": "C", "intervals": [list(i) for i in intervals], **extra}


def test_good_ground_truths():
    truth = GroundedChoiceTruth("C", OPTIONS, ((1.0, 2.0), (24.3, 30.0)))
    assert FIXED.parse_truth(row((1, 2), (24.3, 31.5), duration_s=30)) == truth
    assert FIXED.parse_truth(row((-0.1, 2), duration_s=30)).intervals_s == ((0.0, 2.0),)  # as in NExT-GQA's test split
    late_and_early = row((-0.1, 2), (24.3, 31.5), (3, 3), duration_s=30)
    assert PAPER.parse_truth(late_and_early).intervals_s == ((-0.1, 2.0), (24.3, 31.5), (3.0, 3.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row((20.9, 12.0)), r"^interval 0 ends \(12.0 s\) before it starts \(20.9 s\)$"),
        (row(), r"intervals is \[\], wanted a list of lists of 2 numbers, at least one"),
        (row((1, 2), duration_s=0), "duration_s is 0.0, wanted more than 0 seconds"),
        (row((1, 2), answer="F"), "answer is 'F', wanted one letter from A to E"),
        (row((1, 2), options=["x"]), "wanted a list of 2 to 26 texts"),
    ],
)
def test_broken_ground_truths_are_refused(bad, message):
    for task in (FIXED, PAPER):
        with pytest.raises(ValueError, match=message):
            task.parse_truth(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row((1, 2), (3, 3)), "interval 1 is empty: it starts and ends at 3.0 s"),
        (row((-3, -1)), "interval 0 starts at -3.0 s, wanted 0 s or later"),
        (row((30, 35), duration_s=30), "interval 0 starts at 30.0 s, but the video ends at 30.0 s"),
    ],
)
def test_the_fixed_recipe_refuses_more(bad, message):
    with pytest.raises(ValueError, match=message):
        FIXED.parse_truth(bad)
    assert PAPER.parse_truth(bad).letter == "C"


def test_prompts_say_what_is_wanted():
    for task in ALL:
        question = task.question(example())
        assert "what did the boy do" in question
        assert "(C) unwrap it" in question
        assert all(word in question for word in ("<answer>A</answer>", "<glue>[(", "seconds", "letter"))
    assert "['(A) share with the girl', '(B) approach" in PAPER.question(example())  # a Python list, as in the original
    assert "<answer>A</answer><glue>[(5.2, 10.4)]</glue>" in PAPER.question(example())


def test_targets_hold_the_evidence_and_earn_the_full_reward():
    ex = example((1.0, 2.0), (4.256, 8.0), reasoning="a box")
    assert FIXED.target(ex) == "<think>a box</think><answer>C</answer><glue>[(1.00, 2.00), (4.26, 8.00)]</glue>"
    assert FIXED_DIRECT.target(ex) == "<answer>C</answer><glue>[(1.00, 2.00), (4.26, 8.00)]</glue>"
    for task in ALL:
        assert scored(task, task.target(example())) == (1, 1, 1)
    early = example((-0.1, 2.0), (-0.0, 3.0))
    assert PAPER.target(early).endswith("<glue>[(0.00, 2.00), (0.00, 3.00)]</glue>")
    assert scored(PAPER, PAPER.target(early), early) == (1, pytest.approx(3 / 3.1), 1)


def test_metrics_keep_failures_in_the_denominator():
    examples = [example((0.0, 10.0))] * 4
    answers = [wrap("C", "[(0, 10)]"), wrap("C", "[(5, 15)]"), wrap("A", "[(0, 5)]"), "no"]
    expected = {
        "acc@gqa": 2 / 4,  # IoP 1, 0.5, 1, 0; the third letter is wrong
        "acc": 2 / 4,
        "miou": pytest.approx((1 + 1 / 3 + 1 / 2) / 4),
        "miop": 2.5 / 4,
        "iop@0.3": 3 / 4,
        "iop@0.5": 3 / 4,
        "nextgqa_miou": pytest.approx((1 + 1 / 3 + 1 / 2) / 4),
        "iou@0.3": 3 / 4,
        "iou@0.5": 2 / 4,
    }
    assert FIXED.metrics(examples, answers) == expected
    assert PAPER.metrics(examples, answers) == expected
    assert next(iter(FIXED.metrics(examples, answers))) == "acc@gqa"
    assert next(iter(PAPER.metrics(examples, answers))) == "miou"
    for task in ALL:
        with pytest.raises(ValueError, match="no examples to score"):
            task.metrics([], [])


def test_a_moment_counts_as_in_the_script_of_the_benchmark():
    """get_tIoU of eval_ground.py gives an instant IoU 0, and IoP 1 where a segment holds it; reversed ones get 0."""
    ex = example((2.0, 4.0), (10.0, 20.0))
    inside = FIXED.metrics([ex], [wrap("C", "[(4.0, 4.0)]")])
    assert (inside["miop"], inside["nextgqa_miou"], inside["acc@gqa"]) == (1, 0, 1)
    beside = FIXED.metrics([ex], [wrap("C", "[(5.0, 5.0)]")])
    assert (beside["miop"], beside["acc@gqa"], beside["acc"]) == (0, 0, 1)
    third = FIXED.metrics([ex], [wrap("C", "[(10.0, 13.0)]")])  # IoU 3 / 10, IoP 1
    assert (third["iou@0.3"], third["iou@0.5"], third["iop@0.3"]) == (1, 0, 1)


def test_metrics_of_several_true_intervals():
    ex = example((0.0, 4.0), (10.0, 20.0))
    one = FIXED.metrics([ex], [wrap("C", "[(2, 12)]")])
    assert one["miou"] == 4 / 20  # shared 2 + 2, union 0 to 20
    assert one["nextgqa_miou"] == 2 / 12  # with 0 to 4; with 10 to 20 it is 2 / 18
    assert one["miop"] == 2 / 10
    both = FIXED.metrics([ex], [wrap("C", "[(0, 4), (10, 20)]")])
    assert (both["miou"], both["nextgqa_miou"], both["miop"]) == (1, 10 / 14, 10 / 14)


def test_best_segments_are_sought_for_iou_and_iop_apart():
    iou, iop = segment_overlap([[(1.0, 12.0)], [], [(3.0, 4.0)]], [[(0.0, 2.0), (10.0, 30.0)], [(0.0, 1.0)], []])
    assert iou == [1 / 12, 0, 0]  # with 0 to 2; with 10 to 30 it is 2 / 29
    assert iop == [2 / 11, 0, 0]  # with 10 to 30; with 0 to 2 it is 1 / 11
    assert segment_overlap([], []) == ([], [])


def test_nothing_outside_the_video_is_counted():
    intervals = [(-5.0, -1.0), (-5.0, 3.0), (4.0, 4.0), (29.0, 31.0), (30.0, 30.0), (30.0, 40.0), (40.0, 40.0)]
    assert inside_video(intervals, 30.0) == [(0.0, 3.0), (4.0, 4.0), (29.0, 30.0), (30.0, 30.0)]
    # cut to an instant at the end it would have IoP 1
    metrics = FIXED.metrics([example((20.0, 30.0))], [wrap("C", "[(40, 50)]")])
    assert (metrics["acc"], metrics["miop"], metrics["acc@gqa"]) == (1, 0, 0)


def test_scores_are_the_benchmarks_whatever_the_recipe():
    """True evidence: 0 to 10 s of 30; the answers of both recipes' rewards would be read otherwise."""
    ex = example((0.0, 10.0))
    said = {  # answer: acc, miou, readable
        wrap("C", "[(0, 300)]"): (1, 10 / 300, True),
        "C [(0, 5)]": (1, 0, False),  # letters and blanks around a list
        "<answer>C</answer> [(0, 5)]": (1, 0.5, True),
        "<answer>The best answer is (C)</answer><glue>```json\n[[0, 5]]\n```</glue>": (1, 0.5, True),
        wrap("C", "[[0, 5]]"): (1, 0, False),
        wrap("c", "[(0, 5)]"): (0, 0.5, False),
        wrap("Because", "[(0, 5)]"): (0, 0.5, True),  # B
        wrap("C", "[]"): (1, 0, True),
    }
    for task in (FIXED, PAPER):
        for answer, (acc, miou, is_readable) in said.items():
            metrics = task.metrics([ex], [answer])
            assert (metrics["acc"], metrics["miou"]) == (acc, pytest.approx(miou)), answer
            assert task.are_readable([ex], [answer]) == [is_readable], answer


def test_trivial_answers():
    examples = [
        example((0.0, 5.0), duration_s=10.0),
        example((0.0, 10.0), duration_s=20.0, letter="A"),
        example((0.0, 10.0), duration_s=20.0),
    ]
    answers = FIXED.trivial_answers(examples)
    assert answers["whole_video"][0] == "<think></think><answer>C</answer><glue>[(0.00, 10.00)]</glue>"
    assert answers["best_constant"][2] == "<think></think><answer>C</answer><glue>[(0.00, 10.00)]</glue>"
    assert FIXED.metrics(examples, answers["whole_video"])["miou"] == 0.5
    best = FIXED.metrics(examples, answers["best_constant"])
    assert (best["miou"], best["acc"], best["acc@gqa"]) == (1, 2 / 3, 2 / 3)
    assert FIXED_DIRECT.trivial_answers(examples)["whole_video"][0].startswith("<answer>C</answer>")
    assert PAPER.trivial_answers([]) == {"whole_video": [], "best_constant": []}
