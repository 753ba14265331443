"""Rewards -> advantages, relative to the group of answers to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from vcr1_fast.types import RolloutGroup

STD_FLOOR = 1e-4  # added to the standard deviation, as the original and TRL do


def group_advantages(
    rewards: Sequence[Sequence[float]], scale: Literal["group", "batch", "none"] = "group"
) -> list[list[float]]:
    """A_gi = (r_gi - mean_i r_gi) / (std + 1e-4); std unbiased, of the group, of all rewards given, or 1.

    A group whose rewards are all equal gets exactly 0 everywhere. Group of one: 0. Source: DeepSeekMath (2402.03300);
    without scaling: Dr. GRPO (2503.20783).

    Args:
        rewards: one sequence of G rewards for each prompt; G may differ between prompts.
    """
    tensors = [torch.tensor(list(group), dtype=torch.float64) for group in rewards]
    everything = torch.cat([torch.zeros(0, dtype=torch.float64), *tensors])
    batch_std = everything.std().item() if everything.numel() > 1 else 0.0
    result = []
    for reward_G in tensors:
        if reward_G.numel() < 2 or bool((reward_G == reward_G[0]).all()):
            result.append([0.0] * reward_G.numel())  # rounding of the mean would leave 1e-17 / 1e-4 otherwise
            continue
        divisor = {"group": reward_G.std().item() + STD_FLOOR, "batch": batch_std + STD_FLOOR, "none": 1.0}[scale]
        result.append(((reward_G - reward_G.mean()) / divisor).tolist())
    return result


def with_advantages(
    groups: Sequence[RolloutGroup], scale: Literal["group", "batch", "none"] = "group"
) -> list[RolloutGroup]:
    """The same groups with `advantages` filled in from `rewards`."""
    advantages = group_advantages([group.rewards for group in groups], scale)
    return [replace(group, advantages=tuple(a)) for group, a in zip(groups, advantages, strict=True)]
