"""Prompts -> scored RolloutGroups: the engine answers, the tasks score all answers of a step in one call each.

`Collector` is what the queue (rollout/queue.py) drives: it also draws further prompts for groups without a signal,
mixes the ground truth in, and counts what went wrong. `collect` is one round of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from vcr1_fast.learner.sharding import World, all_reduce_sum, gather_all
from vcr1_fast.settings.config import Config, TaskConfig
from vcr1_fast.tasks.ground_truth import TargetIds, with_ground_truth
from vcr1_fast.tasks.scoring import RewardFailure, Scored, rewarded, score_groups
from vcr1_fast.tasks.shaping import ORDER_PART
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.temporal_contrast import SHUFFLED_SEED, has_order, order_part, shuffled_prompt
from vcr1_fast.types import Completion, Prompt, RolloutGroup, SampleError, SamplingParams

ROUND_SEED = 1 << 56  # far from the seeds of all steps and ranks, so that no round draws what another one drew
ANY_TASK = ""  # the name under which `Collector.failed_steps` counts the groups of all tasks together


class RewardsFailedError(SampleError):
    """No group, or none of a task, could be scored for task.max_failed_steps steps in a row."""


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

    def draw(self, engine: Answering, prompts: Sequence[Prompt], sampling: SamplingParams) -> Scored:
        """G answers to each prompt, scored. No collective, and nothing of the collector changes: for any thread."""
        target_ids = self.target_ids if self.config.rollout.num_ground_truth else None
        drawn = collect(engine, prompts, sampling, self.tasks, self.config.task, target_ids)
        return self._contrasted(engine, drawn, sampling) if self.config.task.temporal_contrast else drawn

    def complete(
        self,
        drawn: Scored,
        sampling: SamplingParams,
        next_prompts: Callable[[int], list[Prompt]],
        draw: Callable[[list[Prompt], SamplingParams], Scored],
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

    def _counted(self, drawn: Scored) -> list[RolloutGroup]:
        self._failures += drawn.failures
        self._scored.update(group.prompt.example.task for group in drawn.groups)
        self._counts["reward_failures"] += len(drawn.failures)
        self._counts["sampling/ground_truths"] += sum(not c.is_sampled for g in drawn.groups for c in g.completions)
        return drawn.groups

    def _judge_failures(self) -> None:
        """Agree over ranks which examples have no score, and end the run when there was none for too long."""
        gathered = gather_all((self._failures, self._scored), self.world)
        failures = [failure for part, _ in gathered for failure in part]
        scored = sum((part for _, part in gathered), Counter[str]())
        self.failed_ids = [failure.example_id for failure in failures]
        for task in (ANY_TASK, *self.tasks):
            failed = [failure for failure in failures if task in (ANY_TASK, failure.task)]
            if scored[task] or (task == ANY_TASK and scored):
                self.failed_steps.pop(task, None)
            elif failed:
                self.failed_steps[task] = self.failed_steps.get(task, 0) + 1
                if self.failed_steps[task] >= self.config.task.max_failed_steps:
                    raise RewardsFailedError(
                        f"task {task}" if task else "all tasks",
                        f"no group could be scored in {self.failed_steps[task]} steps in a row "
                        f"(task.max_failed_steps); the last error: {failed[-1].example_id}: {failed[-1].reason}; "
                        "mend that and start again, no example is lost",
                    )

    def _contrasted(self, engine: Answering, drawn: Scored, sampling: SamplingParams) -> Scored:
        """The groups with the part "order" (tasks/temporal_contrast.py), G // 2 answers to each shuffled clip. Where
        the shuffled clip has no score, the group has none. Groups without a video stay as they are, behind them."""
        ordered = [group for group in drawn.groups if has_order(group.prompt)]
        unordered = [group for group in drawn.groups if not has_order(group.prompt)]
        shuffled = [shuffled_prompt(group.prompt, sampling.seed) for group in ordered]
        size, seed, config = max(1, sampling.num_completions // 2), sampling.seed + SHUFFLED_SEED, self.config.task
        half = replace(sampling, num_completions=size, seed=seed)
        answered = collect(engine, shuffled, half, self.tasks, config)
        parts_of = {id(group.prompt): group.reward_parts for group in answered.groups}
        groups = [
            rewarded(group, {**group.reward_parts, ORDER_PART: order_part(group, parts_of[id(prompt)])}, config)
            for group, prompt in zip(ordered, shuffled, strict=True)
            if id(prompt) in parts_of
        ]
        return Scored(groups + unordered, drawn.failures + answered.failures)


def collect(
    engine: Answering,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    tasks: Mapping[str, Task],
    config: TaskConfig,
    target_ids: TargetIds | None = None,
) -> Scored:
    """G answers to each prompt, scored. A prompt to which the engine gave no answer has no group.

    `target_ids`: then G - 1 answers are drawn and the last one is the ground truth (`with_ground_truth`).
    """
    if not prompts:
        return Scored([])
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
    return score_groups(groups, tasks, config)
