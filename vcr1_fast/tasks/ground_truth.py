"""The annotated answer among those that the policy drew. Called by rollout/collect.py (`rollout.num_ground_truth`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Completion, Example, RolloutGroup, SampleError, SamplingParams

TargetIds = Callable[[Example], Tensor]  # the tokens of an example's target


def with_ground_truth(group: RolloutGroup, task: Task, target_ids: TargetIds, sampling: SamplingParams) -> RolloutGroup:
    """The group with the task's target as one more completion (TempSamp-R1, 2509.18056).

    It is scored like the others and counts in the group's mean and standard deviation like them, so that a group in
    which no drawn answer is good still has a direction. It was not drawn from the policy: its log-probs are NaN, and
    the learner takes the current policy's own log-prob as the old one (ratio 1, gradient advantage x grad log-prob; no
    importance weight corrects for it). A target that cannot be tokenised or is longer than max_new_tokens is left out.
    """
    example = group.prompt.example
    try:
        ids_R = target_ids(example)
    except SampleError as error:
        print(f"no ground truth in the group: {error}", file=sys.stderr)
        return group
    if ids_R.numel() > sampling.max_new_tokens:
        return group
    truth = Completion(ids_R, torch.full((ids_R.numel(),), torch.nan), "stop", task.target(example))
    return replace(group, completions=(*group.completions, truth))
