"""Rewards -> advantages of a step's groups; the formula itself is in tasks/reward_groups.py, native and plain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.tasks import reward_groups
from vcr1_fast.tasks.reward_groups import STD_FLOOR, AdvantageScale
from vcr1_fast.types import RolloutGroup

Scale = Literal["group", "batch", "none", "task"]

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
    """`tasks.reward_groups.group_advantages` of each prompt's G rewards (G may differ), and scale "task":

        A_gi = (r_gi - mean_i r_gi) / (task_std_g + 1e-4)

    Source: OneThinker (2512.03043), where a group in which an advantage would exceed 5 in size is divided by its own
    standard deviation, as in that paper's released code: a task that has only begun to vary has a std near 0.

    Args:
        task_std: for scale "task" the TaskScale.std of each prompt's task.
    """
    flat = [reward for group in rewards for reward in group]
    offsets = list(accumulate((len(group) for group in rewards), initial=0))

    def per_group(kind: AdvantageScale) -> list[list[float]]:
        advantages = reward_groups.group_advantages(flat, offsets, kind)
        return [advantages[start:end] for start, end in pairwise(offsets)]

    if scale != "task":
        return per_group(scale)
    centred, own_scaled = per_group("none"), per_group("group")
    scaled = [
        [distance / (std + STD_FLOOR) for distance in group] for group, std in zip(centred, task_std, strict=True)
    ]
    return [
        own if max(map(abs, group), default=0.0) > MAX_TASK_SCALED else group
        for group, own in zip(scaled, own_scaled, strict=True)
    ]


def with_advantages(
    groups: Sequence[RolloutGroup], scale: Scale = "group", task_scale: TaskScale | None = None
) -> list[RolloutGroup]:
    """The same groups with `advantages` filled in from `rewards`; scale "task" needs a `task_scale` that knows them."""
    assert scale != "task" or task_scale is not None, "scale task without a TaskScale"
    task_std = [task_scale.std(g.prompt.example.task) for g in groups] if scale == "task" and task_scale else ()
    advantages = group_advantages([group.rewards for group in groups], scale, task_std)
    return [replace(group, advantages=tuple(a)) for group, a in zip(groups, advantages, strict=True)]
