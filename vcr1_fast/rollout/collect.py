"""Prompts -> scored RolloutGroups: the engine answers, the tasks score all answers of a step in one call each.

`Collector` is what the queue (rollout/queue.py) drives: it also draws further prompts for groups without a signal,
mixes the ground truth in, and counts what went wrong. `collect` is one round of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vcr1_fast.learner.sharding import World, all_reduce_sum, gather_all
from vcr1_fast.rollout.temporal_contrast import SHUFFLED_SEED, has_order, order_part, shuffled_prompt
from vcr1_fast.settings.config import Config, TaskConfig
from vcr1_fast.tasks.reward_process import RewardError, RewardTimeoutError
from vcr1_fast.tasks.shaping import ORDER_PART, shaped, with_length_part
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Completion, Example, Prompt, RolloutGroup, SampleError, SamplingParams

RewardParts = dict[str, tuple[float, ...]]
TargetIds = Callable[[Example], Tensor]

ROUND_SEED = 1 << 56  # far from the seeds of all steps and ranks, so that no round draws what another one drew
ANY_TASK = ""  # the name under which `Collector.failed_steps` counts the groups of all tasks together


@dataclass(frozen=True)
class RewardFailure:
    """A group that could not be scored. That says nothing against the example, which is to come again."""

    example_id: str
    task: str
    reason: str


class RewardsFailedError(SampleError):
    """No group, or none of a task, could be scored for task.max_failed_steps steps in a row."""


@dataclass(frozen=True)
class Drawn:
    """Answers to some prompts, scored, and the groups that could not be."""

    groups: list[RolloutGroup]
    failures: tuple[RewardFailure, ...] = ()


class Answering(Protocol):
    """The part of a RolloutEngine that is needed here."""

    @property
    def policy_version(self) -> int: ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]: ...


class Collector:
    """One step's groups from one step's prompts: `draw` on each rank alone, then `complete` on all ranks alike."""

    def __init__(self, tasks: Mapping[str, Task], config: Config, world: World, target_ids: TargetIds) -> None:
        """`target_ids` gives the tokens of an example's ground truth (PromptBuilder.completion_ids)."""
        self.tasks, self.config, self.world = tasks, config, world
        self.target_ids = target_ids
        self.failed_steps: dict[str, int] = {}  # task -> steps in a row in which none of its groups could be scored
        self.failed_ids: list[str] = []  # examples of the last step without a score, over all ranks
        self._failures: list[RewardFailure] = []  # of the last step, this rank's
        self._scored: Counter[str] = Counter()  # the same: groups by task
        self._counts: Counter[str] = Counter()  # the same: of `metrics`

    def draw(self, engine: Answering, prompts: Sequence[Prompt], sampling: SamplingParams) -> Drawn:
        """G answers to each prompt, scored. No collective, and nothing of the collector changes: for any thread."""
        target_ids = self.target_ids if self.config.rollout.num_ground_truth else None
        drawn = collect(engine, prompts, sampling, self.tasks, self.config.task, target_ids)
        return self._contrasted(engine, drawn, sampling) if self.config.task.temporal_contrast else drawn

    def complete(
        self,
        drawn: Drawn,
        sampling: SamplingParams,
        next_prompts: Callable[[int], list[Prompt]],
        draw: Callable[[list[Prompt], SamplingParams], Drawn],
    ) -> list[RolloutGroup]:
        """This rank's groups of one step. A collective. Raises RewardsFailedError, on every rank alike.

        Dynamic sampling (DAPO, 2503.14476): groups whose rewards are all equal have advantage 0 and teach nothing. They
        are dropped for answers to as many further prompts, taken from the stream by `next_prompts(count)` as any other
        prompts are, so that its position accounts for them, and answered by `draw`. After max_resample_rounds rounds
        what came is kept. The number of further prompts is that of all ranks together, rounded up to a multiple of the
        ranks: every rank answers equally many, and a step may hold up to ranks - 1 groups more than
        train.prompts_per_step.
        """
        self._counts, self._scored, self._failures = Counter(), Counter(), []
        groups = self._counted(drawn)
        for round_index in range(self.config.rollout.max_resample_rounds):
            kept = [group for group in groups if len(set(group.rewards)) > 1]
            num_flat = int(all_reduce_sum({"flat": float(len(groups) - len(kept))}, self.world)["flat"])
            if num_flat == 0:
                break
            self._counts["sampling/resampled_groups"] += len(groups) - len(kept)
            num_ranks = self.world.world_size
            further = next_prompts(-(-num_flat // num_ranks) * num_ranks)
            seed = sampling.seed + (round_index + 1) * ROUND_SEED
            groups = kept + self._counted(draw(further, replace(sampling, seed=seed)))
        self._judge_failures()
        return groups

    def metrics(self) -> dict[str, float]:
        """What the last `complete` counted, over all ranks. A collective."""
        names = ["reward_failures"]  # groups without a score
        names += ["sampling/resampled_groups"] * (self.config.rollout.max_resample_rounds > 0)
        names += ["sampling/ground_truths"] * (self.config.rollout.num_ground_truth > 0)
        return all_reduce_sum({name: float(self._counts[name]) for name in names}, self.world)

    def _counted(self, drawn: Drawn) -> list[RolloutGroup]:
        self._failures += drawn.failures
        self._scored.update(group.prompt.example.task for group in drawn.groups)
        self._counts["reward_failures"] += len(drawn.failures)
        self._counts["sampling/ground_truths"] += sum(not c.is_sampled for g in drawn.groups for c in g.completions)
        return drawn.groups

    def _judge_failures(self) -> None:
        """Agree over ranks which examples have no score, and end the run when there was none for too long."""
        gathered = gather_all((self._failures, self._scored), self.world)
        failures = [failure for part, _ in gathered for failure in part]
        failed, scored = Counter(failure.task for failure in failures), Counter[str]()
        for _, part in gathered:
            scored += part
        failed[ANY_TASK], scored[ANY_TASK] = failed.total(), scored.total()
        self.failed_ids = [failure.example_id for failure in failures]
        for task in (ANY_TASK, *self.tasks):
            if scored[task]:
                self.failed_steps.pop(task, None)
            elif failed[task]:
                self.failed_steps[task] = self.failed_steps.get(task, 0) + 1
            if self.failed_steps.get(task, 0) >= self.config.task.max_failed_steps:
                last = [failure for failure in failures if task in (ANY_TASK, failure.task)][-1]
                raise RewardsFailedError(
                    f"task {task}" if task else "all tasks",
                    f"no group could be scored in {self.failed_steps[task]} steps in a row (task.max_failed_steps); "
                    f"the last error: {last.example_id}: {last.reason}; mend that and start again, no example is lost",
                )

    def _contrasted(self, engine: Answering, drawn: Drawn, sampling: SamplingParams) -> Drawn:
        """The groups with the part "order" (rollout/temporal_contrast.py), G // 2 answers to each shuffled clip. Where
        the shuffled clip has no score, the group has none. Groups without a video stay as they are, behind them."""
        unordered = [group for group in drawn.groups if not has_order(group.prompt)]
        ordered = [group for group in drawn.groups if has_order(group.prompt)]
        shuffled = [shuffled_prompt(group.prompt, sampling.seed) for group in ordered]
        half = replace(
            sampling, num_completions=max(1, sampling.num_completions // 2), seed=sampling.seed + SHUFFLED_SEED
        )
        answered = collect(engine, shuffled, half, self.tasks, self.config.task)
        parts_of = {id(group.prompt): group.reward_parts for group in answered.groups}
        groups = [
            rewarded(
                group,
                {**group.reward_parts, ORDER_PART: order_part(group, parts_of[id(prompt)])},
                self.config.task,
            )
            for group, prompt in zip(ordered, shuffled, strict=True)
            if id(prompt) in parts_of
        ]
        return Drawn(groups + unordered, drawn.failures + answered.failures)


def collect(
    engine: Answering,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    tasks: Mapping[str, Task],
    config: TaskConfig,
    target_ids: TargetIds | None = None,
) -> Drawn:
    """G answers to each prompt, scored. A prompt to which the engine gave no answer has no group.

    `target_ids`: then G - 1 answers are drawn and the last one is the ground truth (`with_ground_truth`).
    """
    if not prompts:
        return Drawn([])
    if target_ids is not None:
        sampling = replace(sampling, num_completions=sampling.num_completions - 1)
    answers = engine.generate(prompts, sampling)
    groups = [
        RolloutGroup(prompt, tuple(completions), engine.policy_version)
        for prompt, completions in zip(prompts, answers, strict=True)
        if completions
    ]
    if target_ids is not None:
        groups = [with_ground_truth(g, tasks[g.prompt.example.task], target_ids, sampling) for g in groups]
    scored: dict[int, RolloutGroup] = {}
    failures: list[RewardFailure] = []
    for name in sorted({group.prompt.example.task for group in groups}):
        members = [i for i, group in enumerate(groups) if group.prompt.example.task == name]
        for index, parts in zip(members, _scores(tasks[name], [groups[i] for i in members]), strict=True):
            if isinstance(parts, RewardFailure):
                failures.append(parts)
            else:
                scored[index] = rewarded(groups[index], parts, config)
    return Drawn([scored[i] for i in sorted(scored)], tuple(failures))


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


def rewarded(group: RolloutGroup, parts: RewardParts, config: TaskConfig) -> RolloutGroup:
    """The group with its reward parts as the task gave them, the part for its length, and the reward of all of them."""
    parts = {
        name: tuple(values)
        for name, values in with_length_part(parts, [c.num_tokens for c in group.completions], config).items()
    }
    return replace(
        group, reward_parts=parts, rewards=weighted_sum(shaped(parts, config.shaping), config.reward_weights)
    )


def weighted_sum(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> tuple[float, ...]:
    """reward_i = sum over parts of weight * part_i; a part without a weight counts 1."""
    columns = [[weights.get(name, 1.0) * value for value in values] for name, values in parts.items()]
    return tuple(sum(row) for row in zip(*columns, strict=True))


def _scores(task: Task, groups: Sequence[RolloutGroup]) -> list[RewardParts | RewardFailure]:
    """Reward parts of each group, all groups in one call; if that call raises, group by group to find the culprit.

    Once a group alone took too long the others are not asked: 64 of them would wait 64 times. They come again.
    """
    if len(groups) > 1:
        with contextlib.suppress(Exception, SystemExit):  # a reward is user code: whatever it raises, the run goes on
            return [*_score(task, groups)]
    result: list[RewardParts | RewardFailure] = []
    hung = ""
    for group in groups:
        reason = f"not asked, as for another group of the step {hung}"
        if not hung:
            try:
                result += _score(task, [group])
                continue
            except (Exception, SystemExit) as error:
                raised = f"the reward of task {task.name} raised {type(error).__name__}: {error}"
                reason = str(error) if isinstance(error, RewardError) else raised
                hung = str(error) if isinstance(error, RewardTimeoutError) else ""
        failure = RewardFailure(group.prompt.example.id, task.name, reason)
        print(f"reward failure: {failure.example_id}: {failure.reason}", file=sys.stderr)
        result.append(failure)
    return result


def _score(task: Task, groups: Sequence[RolloutGroup]) -> list[RewardParts]:
    examples = [g.prompt.example for g in groups for _ in g.completions]
    parts = task.score(examples, [c.text for g in groups for c in g.completions])
    result: list[RewardParts] = []
    start = 0
    for group in groups:
        end = start + len(group.completions)
        result.append({name: tuple(values[start:end]) for name, values in parts.items()})
        start = end
    return result
