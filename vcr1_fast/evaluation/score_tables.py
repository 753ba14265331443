"""Held-out scores as tables: before and after with their uncertainty, and by sub-category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from vcr1_fast.evaluation.samples import Sample
from vcr1_fast.evaluation.scores import TaskScore
from vcr1_fast.run.telemetry import console


def print_scores(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> None:
    """A table with the same rows for each task: before (if there is any), after, and the best answer without a model.

    Its rows are the number of examples, the shares of readable and well-formed answers, and the metrics. The number
    after ± is half of the 95 % bootstrap interval; none where a metric is not a mean over examples. Refused rows count
    as 0 without a model as well. Fits 80 columns.
    """
    table = Table("held-out score", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("before ±95 %", "after ±95 %") if before else ("score ±95 %",):
        table.add_column(column, justify="right", no_wrap=True, min_width=6)
    table.add_column("best without a model", no_wrap=True)
    for task, score in after.items():
        shown = ([before.get(task)] if before else []) + [score]
        table.add_row(
            f"[bold]{escape(task)}[/]", *("" if one is None else f"n = {one.num_examples:,}" for one in shown)
        )
        for name in score.forms:
            shares = ("" if one is None or name not in one.forms else f"{one.forms[name]:.3f}" for one in shown)
            table.add_row(f"  {name.replace('_', '-')}", *shares)
        for name in score.metrics:
            baseline, best = max(((label, m[name]) for label, m in score.trivial.items()), key=lambda pair: pair[1])
            values = ("" if one is None else shown_score(one, name) for one in shown)
            table.add_row(f"  {escape(name)}", *values, f"{best:.3f} {escape(baseline)}")
        if score.num_refused:
            table.add_row(f"  [red]{score.num_refused:,} of {score.num_examples:,} rows refused, counted as 0[/]")
        if score.num_bad:
            table.add_row(f"  [red]{score.num_bad:,} of {score.num_examples:,} unreadable, counted as 0[/]")
    console.print(table)


def shown_score(score: TaskScore, metric: str) -> str:
    """`0.512 ±0.031`."""
    value = f"{score.metrics[metric]:.3f}"
    if metric not in score.intervals:
        return value
    low, high = score.intervals[metric]
    return f"{value} ±{(high - low) / 2:.3f}"


def print_categories(samples: Sequence[Sample]) -> None:
    """For each task and each axis of its categories: one row per value with its count and the mean of every metric."""
    for task in dict.fromkeys(sample.task for sample in samples):
        own = [sample for sample in samples if sample.task == task]
        for axis, rows in category_means(own).items():
            metrics = list(own[0].metrics)
            axis = escape(axis)  # of the annotation file, as the values are: `[/x]` would be a wrong tag to rich
            table = Table(axis, "number", *metrics, title=f"{task} by {axis}", title_justify="left", box=box.SIMPLE)
            for value, (count, means) in rows.items():
                table.add_row(escape(value), f"{count:,}", *(f"{means[name]:.3f}" for name in metrics))
            console.print(table)


def category_means(samples: Sequence[Sample]) -> dict[str, dict[str, tuple[int, dict[str, float]]]]:
    """Axis -> value -> (number, metric -> mean) of one task's samples, values in order.

    A sample without an axis is in none of its rows, one with several values of it in the row of each. Empty when there
    are no categories or no per-example metrics.
    """
    members: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        for axis, values in sample.categories.items() if sample.metrics else ():
            for value in values:
                members.setdefault(axis, {}).setdefault(value, []).append(sample)
    return {
        axis: {
            value: (len(own), {name: sum(s.metrics[name] for s in own) / len(own) for name in own[0].metrics})
            for value, own in sorted(rows.items())
        }
        for axis, rows in members.items()
    }
