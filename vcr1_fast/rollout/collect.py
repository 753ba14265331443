"""Prompts -> scored RolloutGroups: the engine answers, the tasks score all answers of a step in one call each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vcr1_fast.config import TaskConfig
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Prompt, RolloutGroup, SampleError, SamplingParams

RewardParts = dict[str, tuple[float, ...]]


def collect(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    tasks: Mapping[str, Task],
    config: TaskConfig,
    on_failure: Callable[[SampleError], None],
) -> list[RolloutGroup]:
    """G answers to each prompt, scored. A group whose reward raises is reported through `on_failure` and left out."""
    if not prompts:
        return []
    answers = engine.generate(prompts, sampling)
    groups = [
        RolloutGroup(prompt, tuple(completions), engine.policy_version)
        for prompt, completions in zip(prompts, answers, strict=True)
    ]
    scored: dict[int, RolloutGroup] = {}
    for name in sorted({p.example.task for p in prompts}):
        members = [i for i, p in enumerate(prompts) if p.example.task == name]
        parts = score_groups(tasks[name], [groups[i] for i in members], on_failure)
        for index, group_parts in zip(members, parts, strict=True):
            if group_parts is not None:
                rewards = weighted_sum(group_parts, config.reward_weights)
                scored[index] = replace(groups[index], reward_parts=group_parts, rewards=rewards)
    return [scored[i] for i in sorted(scored)]


def weighted_sum(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> tuple[float, ...]:
    """reward_i = sum over parts of weight * part_i; a part without a weight counts 1."""
    columns = [[weights.get(name, 1.0) * value for value in values] for name, values in parts.items()]
    return tuple(sum(row) for row in zip(*columns, strict=True))


def score_groups(
    task: Task, groups: Sequence[RolloutGroup], on_failure: Callable[[SampleError], None]
) -> list[RewardParts | None]:
    """Reward parts of each group, all groups in one call; if that call raises, group by group to find the culprit."""
    try:
        return _score(task, groups)
    except Exception as error:  # a reward is user code: whatever it raises must not lose the run
        if len(groups) == 1:
            example = groups[0].prompt.example
            reason = f"the reward of task {task.name} raised {type(error).__name__}: {error}"
            on_failure(SampleError(example.id, reason))
            print(f"reward failure: {example.id}: {reason}", file=sys.stderr)
            return [None]
        return [score_groups(task, [group], on_failure)[0] for group in groups]


def _score(task: Task, groups: Sequence[RolloutGroup]) -> list[RewardParts | None]:
    examples = [g.prompt.example for g in groups for _ in g.completions]
    parts = task.score(examples, [c.text for g in groups for c in g.completions])
    result: list[RewardParts | None] = []
    start = 0
    for group in groups:
        end = start + len(group.completions)
        result.append({name: tuple(values[start:end]) for name, values in parts.items()})
        start = end
    return result
