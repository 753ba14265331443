"""Video quality: truths, prompts, rewards and metrics of both recipes."""

import dataclasses

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.video_quality import VideoQuality
from vcr1_fast.types import Example, LabelTruth

FIXED = VideoQuality(TaskConfig())
PAPER = VideoQuality(TaskConfig(recipe="paper"))
FIXED_DIRECT = VideoQuality(TaskConfig(think=False))
PAPER_DIRECT = VideoQuality(TaskConfig(recipe="paper", think=False))
ALL = (FIXED, PAPER, FIXED_DIRECT, PAPER_DIRECT)
LABELS = ("low quality", "high quality")
QUERY = "How good is the video? Choose one of 'low quality', 'high quality'."


def example(label="low quality", labels=LABELS, **changes):
    return Example("e", "video_quality", "/v.mp4", QUERY, 8.0, LabelTruth(label, labels), **changes)


def scored(task, answer, ex=None):
    parts = task.score([ex or example()], [answer])
    return parts["format"][0], parts["accuracy"][0]


def wrap(answer):
    return f"<think>t</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "fixed", "paper"),
    [
        (wrap("low quality"), (1, 1), (1, 1)),
        (wrap(" Low Quality\n"), (1, 1), (1, 1)),
        (wrap("high quality"), (1, 0), (1, 0)),
        (wrap("low quality."), (1, 1), (1, 0)),  # one full stop is one wrong answer for the original
        (wrap("'low quality'"), (1, 1), (1, 0)),
        (wrap("low  quality"), (1, 1), (1, 0)),
        (wrap("low"), (0, 0), (1, 0)),
        (wrap("low quality or high quality"), (0, 0), (1, 0)),
        (wrap(""), (0, 0), (1, 0)),
        (wrap("high quality") + "<answer>low quality</answer>", (0, 1), (1, 0)),  # the last block, the first block
        ("<think><answer>low quality</answer></think><answer>high quality</answer>", (0, 0), (1, 1)),
        ("<answer>low quality</answer>", (0, 1), (0, 1)),
        ("low quality", (0, 0), (0, 0)),
        ("<think>t</think><answer>low quality", (0, 0), (0, 0)),
        ("", (0, 0), (0, 0)),
    ],
)
def test_rewards(answer, fixed, paper):
    assert scored(FIXED, answer) == fixed
    assert scored(PAPER, answer) == paper


def test_without_thinking_the_original_still_rewards_the_think_block():
    assert scored(FIXED_DIRECT, "<answer>low quality</answer>") == (1, 1)
    assert scored(FIXED_DIRECT, wrap("low quality")) == (0, 1)
    assert scored(PAPER_DIRECT, "<answer>low quality</answer>") == (0, 1)
    assert scored(PAPER_DIRECT, wrap("low quality")) == (1, 1)


def test_any_text_is_a_label_where_the_labels_are_not_known():
    ex = example(labels=())
    assert scored(FIXED, wrap("low quality"), ex) == (1, 1)
    assert scored(FIXED, wrap("something"), ex) == (1, 0)
    assert scored(FIXED, wrap(" . "), ex) == (0, 0)


def test_a_batch_scores_each_answer_against_its_own_truth():
    parts = FIXED.score([example(), example("high quality")], [wrap("low quality"), wrap("low quality")])
    assert parts == {"format": [1.0, 1.0], "accuracy": [1.0, 0.0]}
    assert tuple(parts) == FIXED.part_names


def test_ground_truths():
    for task in ALL:
        assert task.parse_truth({"answer": " low quality "}) == LabelTruth("low quality")
        assert task.parse_truth({"answer": "low quality", "options": list(LABELS)}) == LabelTruth("low quality", LABELS)
        for bad, message in [
            ({}, "answer is missing, wanted text that is not empty"),
            ({"answer": ""}, "answer is '', wanted text"),
            ({"answer": 1}, "answer is 1, wanted text"),
            (
                {"answer": "medium", "options": list(LABELS)},
                "answer is 'medium', wanted one of the options: low quality",
            ),
            ({"answer": "x", "options": ["x"]}, "wanted a list of 2 to 26 texts"),
        ]:
            with pytest.raises(ValueError, match=message):
                task.parse_truth(bad)


def test_prompts_say_what_is_wanted():
    for task in ALL:
        question = task.question(example())
        assert question.startswith(QUERY)
        assert "Choose one of:" not in question  # the instruction names the labels itself
        other = dataclasses.replace(example(), query="How good is it?")
        assert "How good is it? Choose one of: low quality, high quality." in task.question(other)


def test_targets():
    ex = example(reasoning="sharp")
    assert FIXED.target(ex) == "<think>sharp</think><answer>low quality</answer>"
    assert FIXED_DIRECT.target(ex) == "<answer>low quality</answer>"
    for task in (FIXED, PAPER, FIXED_DIRECT):
        assert scored(task, task.target(ex)) == (1, 1)
    assert scored(PAPER_DIRECT, PAPER_DIRECT.target(ex)) == (0, 1)  # the defect above


def test_metrics_and_trivial_answers():
    examples = [example(), example("high quality"), example("high quality"), example("high quality")]
    answers = [wrap("low quality"), wrap("high quality"), "broken", wrap("low quality")]
    assert FIXED.metrics(examples, answers) == {"acc": 0.5}
    trivial = FIXED.trivial_answers(examples)
    assert trivial == {"majority_label": ["<think></think><answer>high quality</answer>"] * 4}
    assert FIXED.metrics(examples, trivial["majority_label"]) == {"acc": 0.75}
