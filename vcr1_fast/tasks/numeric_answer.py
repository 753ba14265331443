"""Numbers to be estimated: how many, how far, how large? Answer: one number, scored by its relative error.

Row: {"id", "task", "video", "query", "duration_s", "answer": 4}; the number may be written as text and is more than 0.

Reward and metric are the mean relative accuracy of VSI-Bench (arXiv 2412.14171). There is no original to follow, so
that both recipes score the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import check_counts, mean, number_truth, read_number
from vcr1_fast.tasks.answer_format import clip, has_strict_format, tag_blocks
from vcr1_fast.tasks.prompt_file import Worded, Wording, one_line
from vcr1_fast.types import Example, NumberTruth

QUESTIONS = {
    "fixed": "{question_line} {reason} one number inside <answer></answer>.",
    "paper": "{question} {reason}Write one number inside <answer></answer>.",
}
PLACEHOLDERS = ("question", "question_line")
REQUIRED = ((*PLACEHOLDERS, "query", "query_line"),)
# 0.5, 0.55, ... 0.95 as the benchmark computes them: an answer exactly on a threshold then counts as it does there.
CONFIDENCES = np.linspace(0.5, 0.95, 10)
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)")
MAX_DIGITS = 400  # of what is given to float(): a double has no more


class NumericAnswer(Worded):
    """Reward parts: format, and accuracy: how near the number is, see `mean_relative_accuracy`."""

    name = "numeric_answer"
    part_names: tuple[str, ...] = ("format", "accuracy")

    def __init__(self, config: TaskConfig) -> None:
        self.think = config.think
        self.wording = Wording(config, self.name, QUESTIONS, PLACEHOLDERS, REQUIRED)

    def parse_truth(self, row: Mapping[str, object]) -> NumberTruth:
        """Raises ValueError for a missing number and for one that is not finite and more than 0."""
        answer = row.get("answer")
        if isinstance(answer, str) and _NUMBER.fullmatch(answer.strip()):
            answer = float(answer)
        value = read_number(answer, "answer")
        if value <= 0.0:
            raise ValueError(f"answer is {value}, wanted more than 0: accuracy is relative to it")
        return NumberTruth(value)

    def question_fields(self, example: Example) -> dict[str, str]:
        """question: as annotated. question_line: one blank between its words."""
        return {"question": example.query, "question_line": one_line(example.query)}

    def target(self, example: Example) -> str:
        """The completion to learn from: the number, after the example's reasoning."""
        return self._answer(number_truth(example).value, example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" (0 or 1) and "accuracy" (in [0, 1]) of N answers.

        The last answer block must be a number and nothing else, "4" or "3.5"; without one accuracy is 0.
        """
        check_counts(len(examples), len(answers))
        texts = [clip(answer) for answer in answers]
        numbers = [_strict_number(text) for text in texts]
        is_formatted = [
            number is not None and has_strict_format(text, self.think)
            for text, number in zip(texts, numbers, strict=True)
        ]
        return {"format": [float(ok) for ok in is_formatted], "accuracy": _accuracy(numbers, examples)}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """mra: mean relative accuracy as VSI-Bench reads and scores answers, in [0, 1]; an unreadable one counts as 0.

        Raises ValueError without examples.
        """
        check_counts(len(examples), len(answers))
        return {"mra": mean(_accuracy([benchmark_number(clip(answer)) for answer in answers], examples))}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Whether there is a number."""
        return [benchmark_number(clip(answer)) is not None for answer in answers]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """best_constant: of the true numbers of these examples the one that scores best as the answer to all."""
        truths = np.array([number_truth(ex).value for ex in examples])
        guesses = np.unique(truths)
        scores = [_relative_accuracy(guess, truths).mean() for guess in guesses]
        best = float(guesses[int(np.argmax(scores))]) if len(examples) else 0.0
        return {"best_constant": [self._answer(best)] * len(examples)}

    def _answer(self, value: float, reasoning: str = "") -> str:
        return self.completion(f"{value:.12g}", reasoning)


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """The share of the confidences c of 0.5, 0.55, ... 0.95 for which |predicted - truth| / truth <= 1 - c; truth > 0.

    VSI-Bench (vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench/utils.py). In [0, 1], in tenths.
    """
    return float(_relative_accuracy(predicted, np.array([truth]))[0])


def _relative_accuracy(predicted: float, truths: np.ndarray) -> np.ndarray:
    errors = np.abs(predicted - truths) / truths
    return (errors[:, None] <= 1 - CONFIDENCES).mean(axis=1)


def benchmark_number(text: str) -> float | None:
    """The number as VSI-Bench reads it: the first word, up to a blank, without full stops at its end, as a float.

    Of the last answer block where there is one, else of the whole text without blanks around it. "4 chairs" is 4,
    "about 4", "four" and "4m" are none. What Python's float() takes is a number, "1e1" and "inf" too.
    """
    blocks = tag_blocks(text, "answer")
    word = (blocks[-1] if blocks else text).strip().split(" ")[0].rstrip(".").strip()
    try:
        return float(word) if len(word) <= MAX_DIGITS else None
    except ValueError:
        return None


def _strict_number(text: str) -> float | None:
    blocks = tag_blocks(text, "answer")
    block = blocks[-1].strip() if blocks else ""
    return float(block) if len(block) <= MAX_DIGITS and _NUMBER.fullmatch(block) else None


def _accuracy(numbers: Sequence[float | None], examples: Sequence[Example]) -> list[float]:
    return [
        mean_relative_accuracy(number, number_truth(ex).value) if number is not None and math.isfinite(number) else 0.0
        for number, ex in zip(numbers, examples, strict=True)
    ]
