"""Held-out score: greedy answers of an engine on every example, beside baselines that need no model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from rich import box
from rich.table import Table

from vcr1_fast.config import Config, ConfigError
from vcr1_fast.learner.sharding import World
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.run import open_run
from vcr1_fast.tasks.task import Task
from vcr1_fast.telemetry import console, progress
from vcr1_fast.types import Example, Prompt, SampleError, SamplingParams


@dataclass(frozen=True)
class TaskScore:
    """Metrics of one task on one set of examples; every value in [0, 1], headline first."""

    metrics: dict[str, float]
    trivial: dict[str, dict[str, float]]  # baseline -> metrics
    num_examples: int
    num_bad: int  # examples that could not be read; they count as wrong

    @property
    def headline(self) -> float:
        return next(iter(self.metrics.values()))

    @property
    def headline_name(self) -> str:
        return next(iter(self.metrics))

    @property
    def best_trivial(self) -> float:
        return max(next(iter(metrics.values())) for metrics in self.trivial.values())


Scores = dict[str, TaskScore]


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    builder: PromptBuilder,
    tasks: Mapping[str, Task],
    config: Config,
    world: World,
) -> Scores:
    """Score of every task that has examples. Ranks answer disjoint shares; all ranks return the same scores."""
    examples = _first_of_each_task(examples, config.eval.max_examples)
    share = list(range(world.rank, len(examples), world.world_size))
    answers = _answer(engine, [examples[i] for i in share], builder, config)
    by_index = dict(zip(share, answers, strict=True))
    if world.world_size > 1:
        gathered: list[dict[int, str | None]] = [{} for _ in range(world.world_size)]
        dist.all_gather_object(gathered, by_index)
        by_index = {index: answer for part in gathered for index, answer in part.items()}
    return {
        name: _score(tasks[name], [(e, by_index[i]) for i, e in enumerate(examples) if e.task == name])
        for name in dict.fromkeys(e.task for e in examples)
    }


def _first_of_each_task(examples: Sequence[Example], limit: int | None) -> list[Example]:
    taken: dict[str, int] = {}
    result = []
    for example in examples:
        taken[example.task] = taken.get(example.task, 0) + 1
        if limit is None or taken[example.task] <= limit:
            result.append(example)
    return result


def _answer(
    engine: RolloutEngine, examples: Sequence[Example], builder: PromptBuilder, config: Config
) -> list[str | None]:
    """One answer per example, None where the example cannot be read."""
    sampling = SamplingParams(
        num_completions=1,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.train.seed,
    )
    chunk = config.rollout.max_batch_rows
    starts = range(0, len(examples), chunk)
    answers: list[str | None] = []
    for start in progress(starts, "evaluate", len(starts)):
        prompts = [_build(builder, example) for example in examples[start : start + chunk]]
        readable = [p for p in prompts if p is not None]
        completions = iter(engine.generate(readable, sampling) if readable else [])
        answers += [None if p is None else next(completions)[0].text for p in prompts]
    return answers


def _build(builder: PromptBuilder, example: Example) -> Prompt | None:
    try:
        return builder.build(example)
    except SampleError as error:
        print(f"bad held-out sample, counted as wrong: {error}", file=sys.stderr)
        return None


def _score(task: Task, pairs: Sequence[tuple[Example, str | None]]) -> TaskScore:
    examples = [example for example, _ in pairs]
    trivial = {name: task.metrics(examples, answers) for name, answers in task.trivial_answers(examples).items()}
    return TaskScore(
        metrics=task.metrics(examples, [answer or "" for _, answer in pairs]),
        trivial=trivial,
        num_examples=len(pairs),
        num_bad=sum(answer is None for _, answer in pairs),
    )


def flat_scores(scores: Scores) -> dict[str, float]:
    """`task/metric` -> value, for logs."""
    return {f"{task}/{name}": value for task, score in scores.items() for name, value in score.metrics.items()}


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """For JSON: task -> metrics, baselines and counts."""
    return {task: asdict(score) for task, score in scores.items()}


def print_scores(before: Scores, after: Scores) -> None:
    """A table with one row per metric, task after task: before, after, and the best answer that needs no model."""
    table = Table("held-out score", box=box.SIMPLE)
    for column in ("before", "after"):
        table.add_column(column, justify="right", no_wrap=True, min_width=6)
    table.add_column("best without a model", no_wrap=True)
    for task, score in after.items():
        table.add_row(f"[bold]{task}[/]")
        for name, value in score.metrics.items():
            earlier = f"{before[task].metrics[name]:.3f}" if task in before else ""
            baseline, best = max(((label, m[name]) for label, m in score.trivial.items()), key=lambda pair: pair[1])
            table.add_row(f"  {name}", earlier, f"{value:.3f}", f"{best:.3f} {baseline}")
    console.print(table)


def evaluate_command(config: Config) -> dict[str, Any]:
    """`vcr1-fast eval`: score `model.path` on `data.eval`, print a table, return the scores."""
    with open_run(config, writes=False) as run:
        examples = run.eval_examples()
        if not examples:
            raise ConfigError("data.eval is empty, wanted at least one annotation file")
        engine = run.open_engine()
        scores = evaluate(engine, examples, run.builder, run.tasks, config, run.world)
        engine.close()
        if run.world.is_main:
            print_scores({}, scores)
        return {"model": config.model.path, "scores": scores_as_dict(scores)}
