"""Rewards of a batch of answers -> advantages relative to the group of answers to the same prompt.

`group_advantages` is what the trainer calls (learner/advantages.py), once per step. The plain function is the
definition of correct, in float64, with every sum from left to right; the compiled module equals it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from vcr1_fast import native

AdvantageScale = Literal["group", "batch", "none"]
STD_FLOOR = 1e-4  # added to the standard deviation, as the original and TRL do


def _moments(rewards: Sequence[float]) -> tuple[float, float, bool]:
    """Mean, unbiased standard deviation, and whether all are equal (the standard deviation is then 0, exactly)."""
    if len(rewards) < 2 or all(reward == rewards[0] for reward in rewards):
        return (rewards[0] if rewards else 0.0), 0.0, True
    total, squares = 0.0, 0.0
    for reward in rewards:
        total += reward
    mean = total / len(rewards)
    for reward in rewards:
        squares += (reward - mean) * (reward - mean)
    return mean, math.sqrt(squares / (len(rewards) - 1)), False


def group_advantages_plain(
    rewards: Sequence[float], group_offsets: Sequence[int], scale: AdvantageScale
) -> list[float]:
    """A_s = (r_s - mean of its group) / (std + 1e-4), std unbiased; S rewards -> S advantages.

    Group g is answers group_offsets[g] to group_offsets[g + 1]. scale "group": std of the group (DeepSeekMath, arXiv
    2402.03300); "batch": of all S rewards; "none": the divisor is 1 (Dr. GRPO, arXiv 2503.20783). A group whose rewards
    are all equal gets exactly 0: rounding of the mean would leave 1e-17 / 1e-4 otherwise.
    """
    batch_std = _moments(rewards)[1] if scale == "batch" else 0.0
    advantages = [0.0] * len(rewards)
    for g in range(len(group_offsets) - 1):
        begin, end = group_offsets[g], group_offsets[g + 1]
        mean, std, are_equal = _moments(rewards[begin:end])
        divisor = 1.0 if scale == "none" else (batch_std if scale == "batch" else std) + STD_FLOOR
        for s in range(begin, end):
            advantages[s] = 0.0 if are_equal else (rewards[s] - mean) / divisor
    return advantages


def group_advantages_native(
    rewards: Sequence[float], group_offsets: Sequence[int], scale: AdvantageScale
) -> list[float]:
    """`group_advantages` by the compiled module, which must be there."""
    advantages = np.empty(len(rewards), np.float64)
    arrays = np.array(rewards, np.float64), np.array(group_offsets, np.int64)
    native.compute("group_advantages", (*arrays, scale), advantages)
    return advantages.tolist()


def group_advantages(rewards: Sequence[float], group_offsets: Sequence[int], scale: AdvantageScale) -> list[float]:
    """`group_advantages_plain`, in one call of the compiled module where there is one.

    Raises ValueError unless group_offsets rise from 0 to the number of rewards and the scale is known.
    """
    _check(len(rewards), group_offsets, scale)
    return _group_advantages(rewards, group_offsets, scale)


# compiled or plain is decided here, once; which half of the compiled module, when a run starts
_group_advantages = group_advantages_native if native.is_available() else group_advantages_plain


def _check(num_rewards: int, group_offsets: Sequence[int], scale: str) -> None:
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}, wanted 'group', 'batch' or 'none'")
    is_rising = all(group_offsets[g] <= group_offsets[g + 1] for g in range(len(group_offsets) - 1))
    if not group_offsets or group_offsets[0] != 0 or group_offsets[-1] != num_rewards or not is_rising:
        raise ValueError(f"group_offsets are {list(group_offsets)!r:.80}, wanted to rise from 0 to {num_rewards}")
