"""RolloutGroups -> the same with reward parts and rewards: each task scores all answers of a step in one call.

Called by rollout/collect.py, on each rank and for any thread: nothing is kept between calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.reward_process import RewardError, RewardTimeoutError
from vcr1_fast.tasks.shaping import Parts, shaped, with_length_part
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import RolloutGroup


@dataclass(frozen=True)
class RewardFailure:
    """A group that could not be scored. That says nothing against the example, which is to come again."""

    example_id: str
    task: str
    reason: str


@dataclass(frozen=True)
class Scored:
    """Groups with their rewards, and the groups that could not be scored."""

    groups: list[RolloutGroup]
    failures: tuple[RewardFailure, ...] = ()


def score_groups(groups: Sequence[RolloutGroup], tasks: Mapping[str, Task], config: TaskConfig) -> Scored:
    """All groups that their task has a score for, in their order."""
    scored: dict[int, RolloutGroup] = {}
    failures: list[RewardFailure] = []
    for name in sorted({group.prompt.example.task for group in groups}):
        members = [i for i, group in enumerate(groups) if group.prompt.example.task == name]
        for index, parts in zip(members, _parts_or_failures(tasks[name], [groups[i] for i in members]), strict=True):
            if isinstance(parts, RewardFailure):
                failures.append(parts)
            else:
                scored[index] = rewarded(groups[index], parts, config)
    return Scored([scored[i] for i in sorted(scored)], tuple(failures))


def rewarded(group: RolloutGroup, parts: Parts, config: TaskConfig) -> RolloutGroup:
    """The group with its reward parts as the task gave them, the part for its length, and the reward of all of them:
    reward_i = sum over parts of weight * shaped part_i; a part without a weight counts 1."""
    parts = with_length_part(parts, [c.num_tokens for c in group.completions], config)
    columns = [
        [config.reward_weights.get(name, 1.0) * value for value in values]
        for name, values in shaped(parts, config.shaping).items()
    ]
    rewards = tuple(sum(row) for row in zip(*columns, strict=True))
    return replace(group, reward_parts={name: tuple(values) for name, values in parts.items()}, rewards=rewards)


def _parts_or_failures(task: Task, groups: Sequence[RolloutGroup]) -> list[Parts | RewardFailure]:
    """Reward parts of each group, all groups in one call; if that call raises, group by group to find the culprit.

    Once a group alone took too long the others are not asked: 64 of them would wait 64 times. They come again.
    """
    if len(groups) > 1:
        with contextlib.suppress(Exception, SystemExit):  # a reward is user code: whatever it raises, the run goes on
            return [*_parts(task, groups)]
    result: list[Parts | RewardFailure] = []
    hung = ""
    for group in groups:
        reason = f"not asked, as for another group of the step {hung}"
        if not hung:
            try:
                result += _parts(task, [group])
                continue
            except (Exception, SystemExit) as error:
                raised = f"the reward of task {task.name} raised {type(error).__name__}: {error}"
                reason = str(error) if isinstance(error, RewardError) else raised
                hung = str(error) if isinstance(error, RewardTimeoutError) else ""
        failure = RewardFailure(group.prompt.example.id, task.name, reason)
        print(f"reward failure: {failure.example_id}: {failure.reason}", file=sys.stderr)
        result.append(failure)
    return result


def _parts(task: Task, groups: Sequence[RolloutGroup]) -> list[Parts]:
    examples = [g.prompt.example for g in groups for _ in g.completions]
    parts = task.score(examples, [c.text for g in groups for c in g.completions])
    ends = [0, *accumulate(len(group.completions) for group in groups)]
    return [{name: values[i:j] for name, values in parts.items()} for i, j in pairwise(ends)]
