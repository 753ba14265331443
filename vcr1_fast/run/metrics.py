"""What a step reports, summed over ranks. Names are TRL's where TRL has one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from vcr1_fast.learner.sharding import World, all_max_int, all_reduce_sum
from vcr1_fast.learner.step import UpdateReport
from vcr1_fast.tasks.shaping import ADDED_PARTS
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Completion, RolloutGroup


def merged(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """All of them in one."""
    return {name: value for part in parts for name, value in part.items()}


def rollout_metrics(groups: Sequence[RolloutGroup], tasks: Mapping[str, Task], world: World) -> dict[str, float]:
    """Rewards and lengths of one step. A collective. A quantity nothing was measured for is left out.

    reward_std is the mean over groups of the standard deviation inside the group, as in TRL; it and
    frac_reward_zero_std are of all the rewards that advantages are made of. Everything else is of sampled answers: a
    ground truth mixed into a group says nothing about the policy.
    """
    completions = [c for group in groups for c in group.completions if c.is_sampled]
    ended = [c for c in completions if c.finish_reason == "stop"]
    sums = {
        "completions": len(completions),
        "groups": len(groups),
        "ended": len(ended),
        "tokens": _num_tokens(completions),
        "ended_tokens": _num_tokens(ended),
        "reward": sum(sum(sampled(group, group.rewards)) for group in groups),
        "group_std": sum(_std(group.rewards) for group in groups),
        "zero_std_groups": sum(len(set(group.rewards)) == 1 for group in groups),
    }
    sums |= _part_sums(groups, tasks)
    longest = all_max_int(max((c.num_tokens for c in completions), default=0), world)
    shortest = -all_max_int(-min((c.num_tokens for c in completions), default=1 << 30), world)
    total = all_reduce_sum({name: float(value) for name, value in sums.items()}, world)
    if not total["completions"]:
        return {"completions/count": 0.0}
    metrics = {
        "reward": total["reward"] / total["completions"],
        "reward_std": total["group_std"] / total["groups"],
        "frac_reward_zero_std": total["zero_std_groups"] / total["groups"],
        "completions/count": total["completions"],
        "completions/mean_length": total["tokens"] / total["completions"],
        "completions/min_length": float(shortest),
        "completions/max_length": float(longest),
        "completions/clipped_ratio": 1.0 - total["ended"] / total["completions"],
    }
    if total["ended"]:
        metrics["completions/mean_terminated_length"] = total["ended_tokens"] / total["ended"]
    return metrics | _part_means(total, tasks)


def sampled(group: RolloutGroup, values: Sequence[float]) -> list[float]:
    """The values of those completions that the policy drew; empty where the group has no values."""
    return [value for value, c in zip(values, group.completions, strict=False) if c.is_sampled]


def _part_names(task: Task) -> tuple[str, ...]:
    return (*task.part_names, *ADDED_PARTS)  # these only in runs whose settings add them


def _part_sums(groups: Sequence[RolloutGroup], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Sum, sum of squares and count of each reward part of each task; the same names on every rank."""
    sums: dict[str, float] = {}
    for task in tasks.values():
        for part in _part_names(task):
            mine = [sampled(g, g.reward_parts.get(part, ())) for g in groups if g.prompt.example.task == task.name]
            values = [value for group_values in mine for value in group_values]
            sums[f"{task.name}/{part}/sum"] = sum(values)
            sums[f"{task.name}/{part}/squares"] = sum(value * value for value in values)
            sums[f"{task.name}/{part}/count"] = len(values)
    return sums


def _part_means(total: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, float]:
    """`rewards/{task}/{part}/mean` and `/std` (over completions) of each part that was given in this step."""
    metrics: dict[str, float] = {}
    for task in tasks.values():
        for part in _part_names(task):
            name = f"{task.name}/{part}"
            count = total[f"{name}/count"]
            if count:
                mean = total[f"{name}/sum"] / count
                metrics[f"rewards/{name}/mean"] = mean
                metrics[f"rewards/{name}/std"] = max(total[f"{name}/squares"] / count - mean * mean, 0.0) ** 0.5
    return metrics


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Loss, KL, entropy, clipping and tokens of the updates of one step (already summed over ranks)."""
    total: dict[str, float] = {}
    for report in reports:
        for name, value in report.sums.items():
            total[name] = total.get(name, 0.0) + value
    tokens = max(total.get("tokens", 0.0), 1.0)
    metrics = {
        "loss": total.get("loss", 0.0) / len(reports),
        "grad_norm": statistics.fmean(report.grad_norm for report in reports),
        "learning_rate": reports[-1].learning_rate,
        "skipped_updates": float(sum(report.skipped for report in reports)),
        "step_tokens/executed": total.get("tokens_executed", 0.0),
        "step_tokens/unshared": total.get("tokens_unshared", 0.0),
        "groups_too_large": total.get("groups_too_large", 0.0),
    }
    if total.get("planned_available_s"):  # work of all rows over the time of all ranks, as the step plan reckons it
        metrics["busy_frac"] = total["planned_work_s"] / total["planned_available_s"]
    names = {
        "entropy": "entropy",
        "kl": "kl",
        "clipped_low": "clip_ratio/low_mean",
        "clipped_high": "clip_ratio/high_mean",
        "sampling_gap": "sampling/sampling_logp_difference/mean",
        "nll": "nll",
    }
    metrics |= {names[name]: value / tokens for name, value in total.items() if name in names}
    if "sampling_gap" in total:
        metrics["sampling/sampling_logp_difference/max"] = max(report.largest_gap for report in reports)
    if "sampling_weight" in total:
        metrics["sampling/importance_sampling_ratio/mean"] = total["sampling_weight"] / tokens
        metrics["sampling/importance_sampling_ratio/cut_frac"] = total["sampling_cut"] / tokens
    if "clipped_low" in total:
        metrics["clip_ratio/region_mean"] = (total["clipped_low"] + total["clipped_high"]) / tokens
    return metrics


def _num_tokens(completions: Sequence[Completion]) -> int:
    return sum(c.num_tokens for c in completions)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
