"""Reward parts -> what the reward is summed from: non-linear shaping of a part, and a part for the length of an answer.

Called by scoring.py, which knows the lengths, and by temporal_grounding.py, which knows the intervals. Logs
keep the parts as the tasks gave them, so that runs with and without shaping can be compared; only the reward is made of
shaped ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.types import Interval

LENGTH_PART = "length"  # name of the part that `task.length_reward` adds
ORDER_PART = "order"  # and `task.temporal_contrast`
ADDED_PARTS = (LENGTH_PART, ORDER_PART)
CORRECT_ABOVE = 0.1  # a part of an answer that counts as correct is above this, as in Video-R1's code

Parts = Mapping[str, Sequence[float]]

TEMPSAMP_TAU = 0.8
TEMPSAMP_ALPHA_HIGH = 0.01
TEMPSAMP_ALPHA_LOW = 1.0


def tempsamp_r1(value: float) -> float:
    """Compress what is above tau, stretch what is below, rising everywhere (TempSamp-R1, 2509.18056).

        f(r) = tau + a1 ln(r - tau + 1)                              for r >= tau
        f(r) = tau - (exp(a2 (tau - r)) - 1) / (exp(a2) - 1)         for r < tau

    with the values of the paper: tau 0.8, a1 0.01, a2 1. f(0) = 0.087, f(0.8) = 0.8, f(1) = 0.802: near-perfect answers
    and a ground truth mixed into the group (rollout.num_ground_truth) differ little, so that the perfect one does not
    push all others below the group's mean; bad answers differ more than on the plain scale.

    Args:
        value: in [0, 1]; the result is, too.
    """
    if value >= TEMPSAMP_TAU:
        return TEMPSAMP_TAU + TEMPSAMP_ALPHA_HIGH * math.log(value - TEMPSAMP_TAU + 1.0)
    drop = math.expm1(TEMPSAMP_ALPHA_LOW * (TEMPSAMP_TAU - value)) / math.expm1(TEMPSAMP_ALPHA_LOW)
    return TEMPSAMP_TAU - drop


SHAPINGS: dict[str, Callable[[float], float]] = {"tempsamp_r1": tempsamp_r1}


def boundary_factor(predicted: Interval, truths: Sequence[Interval], duration_s: float) -> float:
    """(1 - |s - s'| / t) (1 - |e - e'| / t), what Time-R1 (2503.13377) multiplies the IoU of two intervals with.

    s', e': start and end of the prediction, s, e: of the truth, t: duration of the video, all in seconds. Of several
    true intervals s is the first start and e the last end. A factor below 0, of a prediction outside the video, is 0.
    """
    start_s, end_s = min(start for start, _ in truths), max(end for _, end in truths)
    at_start = 1.0 - abs(start_s - predicted[0]) / duration_s
    at_end = 1.0 - abs(end_s - predicted[1]) / duration_s
    return max(at_start, 0.0) * max(at_end, 0.0)


def shaped(parts: Parts, shaping: Mapping[str, str]) -> dict[str, Sequence[float]]:
    """The parts with those that `task.shaping` names put through its function; names of other tasks' parts are fine."""
    return {
        name: [SHAPINGS[shaping[name]](value) for value in values] if name in shaping else values
        for name, values in parts.items()
    }


def with_length_part(parts: Parts, num_tokens: Sequence[int], config: TaskConfig) -> dict[str, Sequence[float]]:
    """The parts of one group and, unless `task.length_reward` is none, the part "length".

    Args:
        num_tokens: tokens of each completion, the stop token included.
    """
    low, high = config.length_tokens
    if config.length_reward == "window":
        return {**parts, LENGTH_PART: window(is_correct(parts), num_tokens, low, high)}
    if config.length_reward == "overlong":
        return {**parts, LENGTH_PART: [overlong(n, low, high) for n in num_tokens]}
    return dict(parts)


def added_parts(config: TaskConfig) -> set[str]:
    """Names of the parts that these settings add to those of every task."""
    is_added = {LENGTH_PART: config.length_reward != "none", ORDER_PART: config.temporal_contrast}
    return {name for name in ADDED_PARTS if is_added[name]}


def is_correct(parts: Parts) -> list[bool]:
    """Whether each answer counts as correct: all of its task's parts but the format are above 0.1."""
    return [all(value > CORRECT_ABOVE for value in row) for row in _contents(parts)]


def scores(parts: Parts) -> list[float]:
    """How good each answer is: the mean of its task's parts but the format, in [0, 1]; 1 where there is only that."""
    return [sum(row) / len(row) if row else 1.0 for row in _contents(parts)]


def _contents(parts: Parts) -> list[list[float]]:
    """For each answer the parts that say what it is worth: not the format, and not what was added to the task's own."""
    names = [name for name in parts if name != "format" and name not in ADDED_PARTS]
    num_answers = len(next(iter(parts.values()), ()))
    return [[parts[name][i] for name in names] for i in range(num_answers)]


def window(correct: Sequence[bool], num_tokens: Sequence[int], low: int, high: int) -> list[float]:
    """1 for a correct answer of low to high tokens, ends included, else 0; all 0 where fewer than two are correct.

    A right answer that stands alone in its group is above the others already. Source: Video-R1 (2503.21776;
    tulerfeng/Video-R1, src/r1-v/src/open_r1/trainer/grpo_trainer.py, `len_control`). There the bonus is 0.2 for 320 to
    512 tokens: set task.reward_weights.length to 0.2.
    """
    has_several = sum(correct) > 1
    return [float(has_several and ok and low <= n <= high) for ok, n in zip(correct, num_tokens, strict=True)]


def overlong(num_tokens: int, low: int, high: int) -> float:
    """1 up to `low` tokens, falling evenly to 0 at `high` and beyond.

    DAPO's soft overlong punishment (2503.14476) with L_max = high and L_cache = high - low, plus 1 to lie in [0, 1]:
    there 0 up to L_max - L_cache, then ((L_max - L_cache) - n) / L_cache down to -1. An offset that all answers of a
    group share leaves their advantages as they are.
    """
    return min(1.0, max(0.0, (high - num_tokens) / (high - low)))
