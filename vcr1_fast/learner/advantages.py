"""Rewards -> advantages of a step's groups; the formula itself is in tasks/reward_groups.py, native and plain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.tasks import reward_groups
from vcr1_fast.types import RolloutGroup

Scale = Literal["group", "batch", "none", "task"]

# EMA-GRPO's own values: OneThinker (tulerfeng/OneThinker, EasyR1/verl/trainer/core_algos.py)
TASK_STD_FLOOR = 1e-6  # added to a standard deviation
MIN_TASK_STD = 1e-3  # of a task whose rewards hardly vary
MAX_TASK_SCALED = 5.0  # bound of |advantage| above which a group is divided by its own standard deviation instead


class TaskScale:
    """A moving average of each task's reward moments, for advantages of tasks whose rewards spread differently.

    EMA-GRPO (OneThinker, 2512.03043). After each step, for each task k with answers in it, over all ranks:

        m1_k <- d m1_k + (1 - d) mean(r)      m2_k <- d m2_k + (1 - d) mean(r^2)      std_k = sqrt(m2_k - m1_k^2)

    d is `algorithm.scale_decay`; the first step of a task sets both moments. The step's own rewards are in std_k before
    it divides their advantages. A task that did not occur keeps its moments. Source: `_EmaStdTracker` of their
    core_algos.py, which keeps one per process; here the moments are those of all ranks.
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
        """Standard deviation of the task's rewards, >= MIN_TASK_STD. Raises KeyError for a task that never had any."""
        first, second = self.moments[task]
        return max(second - first * first, MIN_TASK_STD**2) ** 0.5

    def metrics(self) -> dict[str, float]:
        """`advantage_scale/{task}`."""
        return {f"advantage_scale/{task}": self.std(task) for task in sorted(self.moments)}


def group_advantages(
    rewards: Sequence[Sequence[float]], scale: Scale = "group", task_std: Sequence[float] = ()
) -> list[list[float]]:
    """`tasks.reward_groups.group_advantages` of each prompt's G rewards (G may differ), and scale "task":

        A_gi = (r_gi - mean_i r_gi) / (task_std_g + 1e-6)

    A group in which an advantage would exceed 5 in size is divided by its own standard deviation + 1e-6 instead, the
    population's (divided by G, unlike scale "group"): a task that has only begun to vary has a std near 0. Source:
    OneThinker (2512.03043), `compute_ema_grpo_outcome_advantage` of their core_algos.py.

    Args:
        task_std: for scale "task" the TaskScale.std of each prompt's task.
    """
    flat = [reward for group in rewards for reward in group]
    offsets = list(accumulate((len(group) for group in rewards), initial=0))

    advantages = reward_groups.group_advantages(flat, offsets, "none" if scale == "task" else scale)
    per_group = [advantages[start:end] for start, end in pairwise(offsets)]
    if scale != "task":
        return per_group
    return [_task_scaled(centred, std) for centred, std in zip(per_group, task_std, strict=True)]


def _task_scaled(centred: Sequence[float], task_std: float) -> list[float]:
    """One group's distances from its mean, divided as `group_advantages` says."""
    divisor = task_std + TASK_STD_FLOOR
    if max(map(abs, centred), default=0.0) / divisor > MAX_TASK_SCALED:
        divisor = (sum(distance**2 for distance in centred) / len(centred)) ** 0.5 + TASK_STD_FLOOR
    return [distance / divisor for distance in centred]


def with_advantages(
    groups: Sequence[RolloutGroup], scale: Scale = "group", task_scale: TaskScale | None = None
) -> list[RolloutGroup]:
    """The same groups with `advantages` filled in from `rewards`; scale "task" needs a `task_scale` that knows them."""
    assert scale != "task" or task_scale is not None, "scale task without a TaskScale"
    task_std = [task_scale.std(g.prompt.example.task) for g in groups] if scale == "task" and task_scale else ()
    advantages = group_advantages([group.rewards for group in groups], scale, task_std)
    return [replace(group, advantages=tuple(a)) for group, a in zip(groups, advantages, strict=True)]
