"""Numbers: truths, rewards, and VSI-Bench's mean relative accuracy, with values computed by hand."""

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.numeric_answer import NumericAnswer, benchmark_number, mean_relative_accuracy
from vcr1_fast.types import ChoiceTruth, Example, NumberTruth

TASK, DIRECT = NumericAnswer(TaskConfig()), NumericAnswer(TaskConfig(think=False))


def example(value=8.0, **changes):
    return Example(
        "n", "numeric_answer", "/v.mp4", "How many chairs are in the room?", 30.0, NumberTruth(value), **changes
    )


def wrap(answer):
    return f"<think>t</think><answer>{answer}</answer>"


def scored(answer, task=TASK):
    parts = task.score([example()], [answer])
    assert tuple(parts) == task.part_names
    return parts["format"][0], parts["accuracy"][0]


@pytest.mark.parametrize(
    ("predicted", "accuracy"),
    [
        (8.0, 1.0),
        (8.3, 1.0),  # off by 0.0375, which 1 - 0.95 allows
        (8.5, 0.9),  # 0.0625
        (7.0, 0.8),  # 0.125: up to 0.85
        (10.0, 0.6),  # exactly 0.25: 0.5, 0.55, ... 0.75 allow it
        (5.0, 0.3),  # 0.375
        (12.0, 0.1),  # exactly 0.5
        (12.1, 0.0),
        (4.0, 0.1),
        (3.9, 0.0),
        (-8.0, 0.0),
        (float("inf"), 0.0),
        (float("nan"), 0.0),
    ],
)
def test_mean_relative_accuracy(predicted, accuracy):
    assert mean_relative_accuracy(predicted, 8.0) == accuracy
    assert mean_relative_accuracy(predicted * 4, 32.0) == accuracy  # relative


def test_a_threshold_counts_as_the_benchmark_rounds_it():
    assert mean_relative_accuracy(4.0, 5.0) == 0.6  # off by 0.2, and 1 - 0.8 is 0.19999999999999996


@pytest.mark.parametrize(
    ("answer", "reward", "number"),
    [
        (wrap("8"), (1, 1), 8.0),
        (wrap(" 8.0 "), (1, 1), 8.0),
        (wrap("+10"), (1, 0.6), 10.0),
        (wrap(".5"), (1, 0), 0.5),
        (wrap("8."), (1, 1), 8.0),
        (wrap("8 chairs"), (0, 0), 8.0),  # the first word counts for the benchmark, not for the reward
        (wrap("8 or 9"), (0, 0), 8.0),
        (wrap("about 8"), (0, 0), None),
        (wrap("eight"), (0, 0), None),
        (wrap("8m"), (0, 0), None),
        (wrap("8,5"), (0, 0), None),
        (wrap("1e1"), (0, 0), 10.0),
        (wrap(""), (0, 0), None),
        (wrap("9" * 500), (0, 0), None),
        (wrap("3") + "<answer>8</answer>", (0, 1), 8.0),
        ("8", (0, 0), 8.0),
        ("  8. There are eight.", (0, 0), 8.0),
        ("There are 8.", (0, 0), None),
        ("8\nchairs", (0, 0), None),  # the benchmark splits at blanks alone
        ("<answer>8</answer>", (0, 1), 8.0),
        ("<think>8</think><answer>8", (0, 0), None),
        ("nan", (0, 0), pytest.approx(float("nan"), nan_ok=True)),
        ("", (0, 0), None),
    ],
)
def test_rewards_are_strict_and_the_benchmark_reads_its_first_word(answer, reward, number):
    assert scored(answer) == reward
    assert benchmark_number(answer) == number
    mra = TASK.metrics([example()], [answer])["mra"]
    assert mra == (0.0 if number is None else mean_relative_accuracy(benchmark_number(answer), 8.0))


def test_metrics_keep_failures_in_the_denominator():
    answers = [wrap("8"), "10 chairs", "many", wrap("inf")]
    assert TASK.metrics([example()] * 4, answers) == {"mra": (1 + 0.6) / 4}
    assert TASK.are_readable([example()] * 3, ["4 chairs", "four", ""]) == [True, False, False]


@pytest.mark.parametrize("value", [4, 2.5, "4", " 2.50 "])
def test_truths(value):
    assert TASK.parse_truth({"answer": value}) == NumberTruth(float(value))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "answer is None, wanted a number"),
        ({"answer": "four"}, "answer is 'four', wanted a number"),
        ({"answer": "nan"}, "answer is 'nan', wanted a number"),
        ({"answer": True}, "answer is True, wanted a number"),
        ({"answer": 0}, "answer is 0.0, wanted more than 0"),
        ({"answer": "-2"}, "answer is -2.0, wanted more than 0"),
        ({"answer": float("inf")}, "wanted a finite number"),
    ],
)
def test_bad_truths_are_named(row, reason):
    with pytest.raises(ValueError, match=reason):
        TASK.parse_truth(row)


def test_questions_and_targets():
    assert TASK.question(example()).startswith("How many chairs are in the room? Think inside <think></think>, then")
    for task in (TASK, DIRECT):
        assert scored(task.target(example()), task) == (1, 1)
    assert TASK.target(example(2.5, reasoning="r")) == "<think>r</think><answer>2.5</answer>"
    with pytest.raises(TypeError, match="holds ChoiceTruth, not a number"):
        TASK.target(Example("c", "numeric_answer", "/v.mp4", "q", 1.0, ChoiceTruth("A", ("a", "b"))))


def test_the_best_constant_answer():
    examples = [example(2.0), example(10.0), example(12.0)]
    answers = TASK.trivial_answers(examples)["best_constant"]
    # 10: 0, 1 and, off by 1/6, 7/10; 12: 0, 1 and, off by 0.2 of 10, 6/10 as above
    assert answers == ["<think></think><answer>10</answer>"] * 3
    assert TASK.metrics(examples, answers)["mra"] == pytest.approx(1.7 / 3)
    assert TASK.trivial_answers([]) == {"best_constant": []}
