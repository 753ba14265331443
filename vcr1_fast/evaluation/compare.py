"""`vcr1-fast compare A B`: did the same examples score differently in two runs of `vcr1-fast eval`? Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from vcr1_fast.evaluation.samples import Sample, read_samples
from vcr1_fast.evaluation.statistics import mean_intervals, sign_flip_p_values
from vcr1_fast.run.telemetry import console
from vcr1_fast.settings.config import ConfigError

NUM_IDS_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """B - A in one metric, over the examples both runs have."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None  # 95 % paired bootstrap by video; None with one video
    p_value: float  # two-sided sign-flip permutation test by video


@dataclass(frozen=True)
class TaskComparison:
    """Both runs on the examples of one task that both have."""

    num_matched: int
    num_videos: int
    metrics: dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """Two runs, and what only one of them has."""

    tasks: dict[str, TaskComparison]
    only_in_a: list[str]  # task:id
    only_in_b: list[str]


def compare_samples(a: Sequence[Sample], b: Sequence[Sample], seed: int = 0) -> Comparison:
    """Pairs samples by task and id. Failures are pairs like any other, with score 0.

    Metrics are those that both runs have. Raises ConfigError when no id is in both, when a run names one twice, or
    when one id stands for different questions: those are not the same examples.
    """
    by_id_a, by_id_b = _by_id(a, "the first file"), _by_id(b, "the second file")
    matched = [key for key in by_id_a if key in by_id_b]
    if not matched:
        raise ConfigError(
            f"no example is in both files: {len(a)} samples such as {a[0].id!r} and {len(b)} such as {b[0].id!r}: "
            "evaluate both models on the same annotation files"
        )
    for key in matched:
        if by_id_a[key].video.rpartition("/")[2] != by_id_b[key].video.rpartition("/")[2]:
            raise ConfigError(
                f"{_name(key)} is about {by_id_a[key].video} in the first file and {by_id_b[key].video} in the second: "
                "these are not the same examples"
            )
    tasks = {}
    for task in dict.fromkeys(task for task, _ in matched):
        pairs = [(by_id_a[key], by_id_b[key]) for key in matched if key[0] == task]
        tasks[task] = _compare_task(pairs, seed)
    return Comparison(
        tasks,
        [_name(key) for key in by_id_a if key not in by_id_b],
        [_name(key) for key in by_id_b if key not in by_id_a],
    )


def _compare_task(pairs: Sequence[tuple[Sample, Sample]], seed: int) -> TaskComparison:
    first_a, first_b = pairs[0]
    names = [name for name in first_a.metrics if name in first_b.metrics]
    videos = [sample.video for sample, _ in pairs]
    num_videos = len(set(videos))
    if not names:
        return TaskComparison(len(pairs), num_videos, {})
    values_a = np.array([[sample.metrics[name] for name in names] for sample, _ in pairs], dtype=np.float64)
    values_b = np.array([[sample.metrics[name] for name in names] for _, sample in pairs], dtype=np.float64)
    bounds = mean_intervals(values_b - values_a, videos, seed=seed)
    p_values = sign_flip_p_values(values_b - values_a, videos, seed=seed)
    metrics = {
        name: Difference(
            a=float(values_a[:, i].mean()),
            b=float(values_b[:, i].mean()),
            difference=float((values_b - values_a)[:, i].mean()),
            interval=None if bounds is None else (float(bounds[0, i]), float(bounds[1, i])),
            p_value=float(p_values[i]),
        )
        for i, name in enumerate(names)
    }
    return TaskComparison(len(pairs), num_videos, metrics)


def _by_id(samples: Sequence[Sample], where: str) -> dict[tuple[str, str], Sample]:
    result: dict[tuple[str, str], Sample] = {}
    first_of_task: dict[str, Sample] = {}
    for sample in samples:
        key, first = (sample.task, sample.id), first_of_task.setdefault(sample.task, sample)
        if key in result:
            raise ConfigError(f"{where} has two samples {_name(key)}, wanted each once")
        if set(first.metrics) != set(sample.metrics):
            raise ConfigError(f"{where}: {_name(key)} has other metrics than {first.id}, so they are not of one run")
        result[key] = sample
    return result


def _name(key: tuple[str, str]) -> str:
    return ":".join(key)


def compare_command(file_a: str, file_b: str) -> dict[str, Any]:
    """Prints a table per task, and on stderr what was left out; returns what the JSON line says. Raises ConfigError."""
    found = compare_samples(read_samples(file_a), read_samples(file_b))
    for file, ids in ((file_a, found.only_in_a), (file_b, found.only_in_b)):
        if ids:
            more = ", ..." if len(ids) > NUM_IDS_SHOWN else ""
            shown = ", ".join(ids[:NUM_IDS_SHOWN])
            print(f"{len(ids)} samples are only in {file} and are left out: {shown}{more}", file=sys.stderr)
    for task, result in found.tasks.items():
        console.print(_table(task, result))
    return {"num_only_in_a": len(found.only_in_a), "num_only_in_b": len(found.only_in_b), **vars(found)}


def _table(task: str, result: TaskComparison) -> Table:
    title = f"{escape(task)}: {result.num_matched:,} examples, {result.num_videos:,} videos"
    table = Table("metric", title=title, title_justify="left", box=box.SIMPLE)
    for column in ("A", "B", "B - A", "95 % interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, d in result.metrics.items():
        interval = "" if d.interval is None else f"{d.interval[0]:+.3f} .. {d.interval[1]:+.3f}"
        p_value = "< 0.001" if d.p_value < 0.001 else f"{d.p_value:.3f}"
        table.add_row(escape(name), f"{d.a:.3f}", f"{d.b:.3f}", f"{d.difference:+.3f}", interval, p_value)
    return table
