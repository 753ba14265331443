"""`vcr1-fast baselines`: what answers that need no model score on an annotation file, as a table and one JSON line.

Loads no model and no torch. The scores are those that `vcr1-fast eval` prints beside a model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vcr1_fast.prompts.dataset import AnnotationFile, AnnotationSource, read_annotation_files
from vcr1_fast.prompts.schemas.schema import Recipe
from vcr1_fast.run.terminal import console, print_problems
from vcr1_fast.settings.config import ConfigError, JudgeConfig, TaskConfig
from vcr1_fast.settings.io import UsageError, load_settings
from vcr1_fast.tasks import make_tasks, task_class


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """The settings that baselines have: captions are compared by a judge, and nothing else needs any."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class Baselines:
    """Scores in [0, 1] of the answers that need no model, headline metric first."""

    task: str
    annotations: str
    recipe: Recipe
    num_examples: int
    num_other_tasks: int  # examples of the file that belong to other tasks
    scores: dict[str, dict[str, float]]  # baseline -> metric -> value
    best_constant_frac: tuple[float, float] | None  # start and end of best_constant, fractions of the video


def measure_baselines(
    task: str, annotations: str | Path, recipe: Recipe = "paper", judge: JudgeConfig | None = None
) -> tuple[Baselines, AnnotationFile]:
    """Baselines of a task on a file of any known schema, and the file as it was read.

    recipe paper keeps the ground truth as the file has it, which is how the benchmarks and the paper score: 27.0 mIoU
    for the whole video on Charades-STA. fixed scores against repaired truths: 27.1. Refused rows are left out, where
    `vcr1-fast eval` counts them as wrong. `judge`: of captioning, by default that of JudgeConfig.

    Raises ConfigError when the file cannot be used or has no example of the task, UsageError for an unknown task.
    """
    try:
        task_class(task)
    except ValueError as error:
        raise UsageError(str(error)) from error
    tasks = make_tasks(TaskConfig(recipe=recipe), judge=judge)
    (content,) = read_annotation_files([AnnotationSource(annotations, task=task)], tasks, recipe)
    examples = [example for example in content.examples if example.task == task]
    if not examples:
        reason = f"; first error: {content.errors[0]}" if content.errors else ""
        raise ConfigError(f"annotation file {annotations} has no usable row of the task {task}{reason}")
    own = tasks[task]
    scores = {name: own.metrics(examples, answers) for name, answers in own.trivial_answers(examples).items()}
    find_constant = getattr(own, "best_constant", None)  # of tasks whose answer is an interval
    constant = find_constant(examples) if find_constant else None
    num_other = len(content.examples) - len(examples)
    return Baselines(task, str(annotations), recipe, len(examples), num_other, scores, constant), content


def baselines_command(
    task: str, annotations: str | Path, recipe: Recipe, as_json: bool, overrides: list[str]
) -> dict[str, Any]:
    """Prints bad rows and, unless `as_json`, what was read and the table. Returns what the JSON line is to say.

    `overrides`: tokens such as --judge.url=http://127.0.0.1:8000/v1. Raises as `measure_baselines`.
    """
    judge = load_settings(BaselinesConfig, None, overrides).judge
    found, content = measure_baselines(task, annotations, recipe, judge)
    print_problems(content.errors, "bad annotation: ", more="bad annotation:")
    if not as_json:
        heading = f"{found.task}, recipe {found.recipe}, {found.num_examples:,} examples, in %:"
        for line in (str(content.summary), heading):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(_table(found))
    return {
        "task": found.task,
        "annotations": found.annotations,
        "recipe": found.recipe,
        "num_examples": found.num_examples,
        "num_other_tasks": found.num_other_tasks,
        "baselines": found.scores,
        "best_constant_frac": found.best_constant_frac,
        "file": content.summary,
    }


def _table(found: Baselines) -> Table:
    """One row per metric, one column per baseline, in percent as the papers print them."""
    table = Table("", box=box.SIMPLE)
    for name in found.scores:
        if name == "best_constant" and found.best_constant_frac:
            start, end = found.best_constant_frac
            name = f"{name} [{start:g}, {end:g}]"
        table.add_column(name, justify="right", no_wrap=True)
    for metric in next(iter(found.scores.values()), {}):
        table.add_row(metric, *(f"{100 * metrics[metric]:.2f}" for metrics in found.scores.values()))
    return table
