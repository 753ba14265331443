"""Multiple choice: truths, prompts, rewards and metrics of both recipes."""

import dataclasses

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.multiple_choice import MultipleChoice
from vcr1_fast.types import ChoiceTruth, Example

FIXED = MultipleChoice(TaskConfig())
PAPER = MultipleChoice(TaskConfig(recipe="paper"))
FIXED_DIRECT = MultipleChoice(TaskConfig(think=False))
PAPER_DIRECT = MultipleChoice(TaskConfig(recipe="paper", think=False))
ALL = (FIXED, PAPER, FIXED_DIRECT, PAPER_DIRECT)
OPTIONS = ("share with the girl", "approach the lady", "unwrap it", "play with a toy train", "gesture something")


def example(letter="C", **changes):
    return Example(
        "e", "multiple_choice", "/v.mp4", "what did the boy do", 30.0, ChoiceTruth(letter, OPTIONS), **changes
    )


def scored(task, answer, ex=None):
    parts = task.score([ex or example()], [answer])
    return parts["format"][0], parts["accuracy"][0]


def wrap(answer, after=""):
    return f"<think>t</think><answer>{answer}</answer>{after}"


@pytest.mark.parametrize(
    ("answer", "fixed", "paper"),
    [
        (wrap("C"), (1, 1), (0, 1)),  # the original's format test demands a glue block
        (wrap("(C) unwrap it"), (1, 1), (0, 1)),
        (wrap("C", "<glue>[]</glue>"), (0, 1), (1, 1)),  # so this is what earns it
        (wrap("C", "<glue>[(1, 2)]</glue>"), (0, 1), (1, 1)),
        (wrap("C", "<glue>[(2, 1)]</glue>"), (0, 1), (0, 1)),
        (wrap("B"), (1, 0), (0, 0)),
        (wrap("c"), (1, 1), (0, 0)),
        (wrap("unwrap it"), (1, 1), (0, 0)),
        (wrap("Clearly unknown"), (0, 0), (0, 1)),  # its first capital from A to G
        (wrap("Because C"), (1, 1), (0, 0)),
        (wrap("C or D"), (0, 0), (0, 1)),
        (wrap("F"), (0, 0), (0, 0)),
        (wrap(""), (0, 0), (0, 0)),
        (wrap("C") + "<answer>D</answer>", (0, 0), (0, 1)),  # the last block, the first block
        (wrap("D") + "<answer>C</answer>", (0, 1), (0, 0)),
        ("<think><answer>C</answer></think><answer>D</answer>", (0, 0), (0, 1)),
        ("<answer>C</answer>", (0, 1), (0, 1)),
        ("C", (0, 0), (0, 0)),
        ("<think>t</think><answer>C", (0, 0), (0, 0)),  # cut off
        ("", (0, 0), (0, 0)),
    ],
)
def test_rewards(answer, fixed, paper):
    assert scored(FIXED, answer) == fixed
    assert scored(PAPER, answer) == paper


def test_rewards_without_think_block():
    assert scored(FIXED_DIRECT, "<answer>C</answer>") == (1, 1)
    assert scored(FIXED_DIRECT, wrap("C")) == (0, 1)
    assert scored(PAPER_DIRECT, "<answer>C</answer>") == (0, 1)
    assert scored(PAPER_DIRECT, "<answer>C</answer>\n<glue>[]</glue>") == (1, 1)
    assert scored(PAPER_DIRECT, wrap("C", "<glue>[]</glue>")) == (0, 1)


def test_because_is_b_for_the_original_only():
    assert scored(PAPER, wrap("Because he did"), example("B")) == (0, 1)
    assert scored(FIXED, wrap("Because he did"), example("B")) == (0, 0)


def test_a_batch_scores_each_answer_against_its_own_truth():
    parts = FIXED.score([example("A"), example("B"), example("C")], [wrap("A"), wrap("A"), "x"])
    assert parts == {"format": [1.0, 1.0, 0.0], "accuracy": [1.0, 0.0, 0.0]}
    assert tuple(parts) == FIXED.part_names


def row(**changes):
    return {"options": list(OPTIONS), "answer": "C", **changes}


def test_good_ground_truths():
    for task in ALL:
        assert task.parse_truth(row()) == ChoiceTruth("C", OPTIONS)
        assert task.parse_truth(row(answer="(C)")) == ChoiceTruth("C", OPTIONS)
    for mark in ("({}) ", "{}. ", "{}) ", "{}: ", "({})"):
        marked = [mark.format(letter) + option for letter, option in zip("ABCDE", OPTIONS, strict=True)]
        assert FIXED.parse_truth(row(options=marked)).options == OPTIONS
    # letters that are not its own belong to the text
    assert FIXED.parse_truth(row(options=["A. Smith", "C. Jones", "none"])).options == ("A. Smith", "C. Jones", "none")
    assert FIXED.parse_truth({"options": [str(i) for i in range(26)], "answer": "Z"}).letter == "Z"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["(A) run", "(B) sit"], None),  # as they would be written anyway
        (["run", "sit"], None),
        (["(A) run ", "(B)  sit"], "['(A) run ', '(B)  sit']"),
        (["A. run", "B. sit"], "['A. run', 'B. sit']"),
        ([" run", "sit"], "['(A)  run', '(B) sit']"),
    ],
)
def test_the_paper_keeps_options_as_they_are_written(options, shown):
    asked = row(options=options, answer="B")
    fixed, paper = FIXED.parse_truth(asked), PAPER.parse_truth(asked)
    assert (fixed.options, fixed.written) == (paper.options, ()) == (("run", "sit"), ())
    question = PAPER.question(dataclasses.replace(example(), truth=paper, query=" what?"))
    assert f'question " what?". Choose one of the options {shown or ["(A) run", "(B) sit"]}. Reason' in question
    assert (paper.written == ()) is (shown is None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": "A"}, "options is missing, wanted a list of 2 to 26 texts"),
        (row(options="abc"), "options is 'abc', wanted a list"),
        (row(options=["one"]), r"options is \['one'\], wanted a list of 2 to 26 texts"),
        (row(options=["x"] * 27), "wanted a list of 2 to 26 texts"),
        (row(options=["x", " "]), r"options\[1\] is ' ', wanted text that is not empty"),
        (row(options=["x", 3]), r"options\[1\] is 3, wanted text"),
        ({"options": ["x", "y"]}, "answer is missing, wanted text that is not empty"),
        (row(answer=2), "answer is 2, wanted text"),
        (row(answer="F"), "answer is 'F', wanted one letter from A to E"),
        (row(answer="c"), "answer is 'c', wanted one letter from A to E"),
        (row(answer="AB"), "answer is 'AB', wanted one letter from A to E"),
        (row(answer="()"), r"answer is '\(\)', wanted one letter from A to E"),
    ],
)
def test_broken_ground_truths_are_refused(bad, message):
    for task in (FIXED, PAPER):
        with pytest.raises(ValueError, match=message):
            task.parse_truth(bad)


def test_the_paper_has_no_letter_after_g():
    eight = {"options": [str(i) for i in range(8)], "answer": "A"}
    assert FIXED.parse_truth(eight).letter == "A"
    with pytest.raises(ValueError, match="there are 8 options, wanted at most 7"):
        PAPER.parse_truth(eight)


def test_prompts_say_what_is_wanted():
    for task in ALL:
        question = task.question(example())
        assert "what did the boy do" in question
        assert all(f"({letter}) {text}" in question for letter, text in zip("ABCDE", OPTIONS, strict=True))
        assert "letter" in question
        assert "glue" not in question
    assert "['(A) share with the girl', '(B) approach" in PAPER.question(example())  # a Python list, as in the original
    assert "what did the boy do? Options" in FIXED.question(example())
    asked = dataclasses.replace(example(), query=" Who  came? ")
    assert FIXED.question(asked).startswith("Who came? Options")


def test_targets_earn_what_can_be_earned():
    ex = example(reasoning="a box")
    assert FIXED.target(ex) == "<think>a box</think><answer>C</answer>"
    assert FIXED_DIRECT.target(ex) == "<answer>C</answer>"
    for letter in "ABCDE":
        for task in (FIXED, FIXED_DIRECT):
            assert scored(task, task.target(example(letter)), example(letter)) == (1, 1)
        for task in (PAPER, PAPER_DIRECT):
            assert scored(task, task.target(example(letter)), example(letter)) == (0, 1)


def test_metrics_and_trivial_answers():
    examples = [example(letter) for letter in "BCCA"]
    assert FIXED.metrics(examples, [wrap("B"), wrap("C"), "broken", wrap("B")]) == {"acc": 0.5}
    answers = FIXED.trivial_answers(examples)
    assert answers == {"majority_letter": ["<think></think><answer>C</answer>"] * 4}
    assert FIXED.metrics(examples, answers["majority_letter"]) == {"acc": 0.5}
    assert FIXED.trivial_answers([]) == {"majority_letter": []}
