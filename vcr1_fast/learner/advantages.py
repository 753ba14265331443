"""Rewards -> advantages, relative to the group of answers to the same prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.types import RolloutGroup

Scale = Literal["group", "batch", "none", "task"]

STD_FLOOR = 1e-4  # added to the standard deviation, as the original and TRL do
MAX_TASK_SCALED = 5.0  # bound of |advantage| above which a group is divided by its own standard deviation instead


class TaskScale:
    """A moving average of each task's reward moments, for advantages of tasks whose rewards spread differently.

    EMA-GRPO (OneThinker, 2512.03043). After each step, for each task k with answers in it, over all ranks:

        m1_k <- d m1_k + (1 - d) mean(r)      m2_k <- d m2_k + (1 - d) mean(r^2)      std_k = sqrt(m2_k - m1_k^2)

    d is `algorithm.scale_decay`; the first step of a task sets both moments. The step's own rewards are in std_k before
    it divides their advantages. A task that did not occur keeps its moments.
    """

    def __init__(self, decay: float, moments: Mapping[str, Sequence[float]] | None = None) -> None:
        """`moments`: task -> (m1, m2), what `moments` of an earlier instance gave."""
        self.decay = decay
        self.moments: dict[str, tuple[float, float]] = {task: (m[0], m[1]) for task, m in (moments or {}).items()}

    def update(self, groups: Sequence[RolloutGroup], tasks: Iterable[str], world: World) -> None:
        """Take in a step's rewards. A collective; `tasks` are all tasks of the run, the same on every rank."""
        names = sorted(tasks)
        sums = {f"{task}/{moment}": 0.0 for task in names for moment in ("0", "1", "2")}
        for group in groups:
            for power in (0, 1, 2):
                sums[f"{group.prompt.example.task}/{power}"] += sum(reward**power for reward in group.rewards)
        total = all_reduce_sum(sums, world)
        for task in names:
            count = total[f"{task}/0"]
            if count == 0:
                continue
            new = (total[f"{task}/1"] / count, total[f"{task}/2"] / count)
            old = self.moments.get(task, new)
            first, second = (self.decay * o + (1 - self.decay) * n for o, n in zip(old, new, strict=True))
            self.moments[task] = (first, second)

    def std(self, task: str) -> float:
        """Standard deviation of the task's rewards, >= 0. Raises KeyError for a task that never had any."""
        first, second = self.moments[task]
        return max(second - first * first, 0.0) ** 0.5

    def metrics(self) -> dict[str, float]:
        """`advantage_scale/{task}`."""
        return {f"advantage_scale/{task}": self.std(task) for task in sorted(self.moments)}


def group_advantages(
    rewards: Sequence[Sequence[float]], scale: Scale = "group", task_std: Sequence[float] = ()
) -> list[list[float]]:
    """A_gi = (r_gi - mean_i r_gi) / (std + 1e-4); std unbiased, of the group, of all rewards given, or 1.

    A group whose rewards are all equal gets exactly 0 everywhere. Group of one: 0. Source: DeepSeekMath (2402.03300);
    without scaling: Dr. GRPO (2503.20783); by task: OneThinker (2512.03043), where a group in which an advantage would
    exceed 5 in size is divided by its own std, as in that paper's released code: a task that has only begun to vary has
    a std near 0.

    Args:
        rewards: one sequence of G rewards for each prompt; G may differ between prompts.
        task_std: for scale "task" the TaskScale.std of each prompt's task.
    """
    tensors = [torch.tensor(list(group), dtype=torch.float64) for group in rewards]
    everything = torch.cat([torch.zeros(0, dtype=torch.float64), *tensors])
    batch_std = everything.std().item() if everything.numel() > 1 else 0.0
    result = []
    for index, reward_G in enumerate(tensors):
        if reward_G.numel() < 2 or bool((reward_G == reward_G[0]).all()):
            result.append([0.0] * reward_G.numel())  # rounding of the mean would leave 1e-17 / 1e-4 otherwise
            continue
        centred_G, own_std = reward_G - reward_G.mean(), reward_G.std().item()
        if scale == "task":
            result.append(_scaled_by_task(centred_G, task_std[index], own_std).tolist())
            continue
        divisor = {"group": own_std + STD_FLOOR, "batch": batch_std + STD_FLOOR, "none": 1.0}[scale]
        result.append((centred_G / divisor).tolist())
    return result


def _scaled_by_task(centred_G: Tensor, task_std: float, own_std: float) -> Tensor:
    scaled_G = centred_G / (task_std + STD_FLOOR)
    return scaled_G if float(scaled_G.abs().max()) <= MAX_TASK_SCALED else centred_G / (own_std + STD_FLOOR)


def with_advantages(
    groups: Sequence[RolloutGroup], scale: Scale = "group", task_scale: TaskScale | None = None
) -> list[RolloutGroup]:
    """The same groups with `advantages` filled in from `rewards`; scale "task" needs a `task_scale` that knows them."""
    assert scale != "task" or task_scale is not None, "scale task without a TaskScale"
    task_std = [task_scale.std(g.prompt.example.task) for g in groups] if scale == "task" and task_scale else ()
    advantages = group_advantages([group.rewards for group in groups], scale, task_std)
    return [replace(group, advantages=tuple(a)) for group, a in zip(groups, advantages, strict=True)]
