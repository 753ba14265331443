"""One answer to one example with its scores: made from answers, written to samples.jsonl, read back for comparison."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from vcr1_fast.evaluation.statistics import mean_intervals
from vcr1_fast.run.telemetry import to_json
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.tasks.shown import shown_answer, shown_question, shown_times_s, shown_truth
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example

MEAN_TOLERANCE = 1e-9  # a mean over examples differs from the task's own by rounding at most
NO_TEXT = "the model gave no text"
JUDGED = "judged"  # the metric of a task with a judge that says which share of the answers has a verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one example."""

    text: str  # "" where there is a failure
    failure: str = ""  # why there is nothing to score; "" when there is
    finish_reason: str = ""  # "stop", or "length" when it was cut off; "" without an answer
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of samples.jsonl. `parts` are the reward parts, `metrics` those that are means over examples."""

    id: str
    task: str
    video: str
    question: str
    answer: str
    parts: dict[str, float]
    metrics: dict[str, float]
    failure: str
    finish_reason: str
    num_tokens: int
    categories: dict[str, list[str]] = field(default_factory=dict)  # axis -> values, for tables
    readable: bool | None = None  # whether the benchmark's reader found something; None: the task does not say
    well_formed: bool | None = None  # whether the reward's format is kept
    truth: str = ""  # as text, and `parsed`, what the answer says without its reasoning: for people (tasks.shown)
    parsed: str = ""
    times_s: list[float] = field(default_factory=list)  # of the true boxes


def per_sample_metrics(
    task: Task, examples: Sequence[Example], texts: Sequence[str], metrics: Mapping[str, float]
) -> dict[str, list[float]]:
    """Metric -> one value per example, for the metrics that are means of such values; the others are left out.

    A task may say them itself with `sample_metrics(examples, answers)`; else each example is scored on its own, and a
    metric counts as a mean when the mean of its values is the task's own (captioning's F1 of mean recall and mean
    precision is none). Left out altogether where a judge was down (metric `judged` below 1): asking again, one by one,
    would wait for it once per example.
    """
    own = getattr(task, "sample_metrics", None)
    if own is None and metrics.get(JUDGED, 1.0) < 1.0:
        return {}
    try:
        if own is not None:
            values: dict[str, list[float]] = own(examples, texts)
        else:
            alone = [task.metrics([example], [text]) for example, text in zip(examples, texts, strict=True)]
            values = {name: [single[name] for single in alone] for name in metrics}
    except (Exception, SystemExit) as error:  # user code, such as a correlation, which one example does not have
        print(f"no intervals: task {task.name}, one by one: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    return {
        name: column
        for name, column in values.items()
        if math.isclose(sum(column) / len(column), metrics[name], rel_tol=0.0, abs_tol=MEAN_TOLERANCE)
    }


def of_all(metrics: Mapping[str, float], usable_frac: float) -> dict[str, float]:
    """Metrics of the usable examples -> of all of them: a refused one adds 0 to the mean that a metric is.

    (Captioning's F1 of two means scales with them.) `judged`, which says whether a judge answered, takes nothing off.
    """
    missing = 1.0 - usable_frac
    return {name: value * usable_frac + (missing if name == JUDGED else 0.0) for name, value in metrics.items()}


def with_refused(column: Sequence[float], examples: Sequence[Example], metric: str) -> list[float]:
    """Values of the usable examples -> one of each example, as `of_all` counts them."""
    values = iter(column)
    return [float(metric == JUDGED) if example.is_refused else next(values) for example in examples]


def metric_intervals(
    values: Mapping[str, Sequence[float]], clusters: Sequence[str], seed: int
) -> dict[str, tuple[float, float]]:
    """Metric -> 95 % bootstrap interval of its mean, by cluster; empty with fewer than two clusters."""
    if not values:
        return {}
    bounds = mean_intervals(np.array(list(values.values())).T, clusters, seed=seed)
    if bounds is None:
        return {}
    return {name: (float(low), float(high)) for name, low, high in zip(values, *bounds, strict=True)}


def make_samples(
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    metrics: Mapping[str, Sequence[float]],
    forms: Mapping[str, Sequence[bool]],
) -> list[Sample]:
    """One sample per example of one task; `metrics` and `forms` (see `answer_forms`) have one value of each.

    Reward parts are left out, with a line, when the task's score raises: a judge that is down must not lose the rest.
    """
    usable = [i for i, example in enumerate(examples) if not example.is_refused]
    try:
        scored = task.score([examples[i] for i in usable], [answers[i].text for i in usable])
    except (Exception, SystemExit) as error:  # user code, or a judge
        print(f"no reward parts in samples.jsonl: task {task.name}: {type(error).__name__}: {error}", file=sys.stderr)
        scored = {}
    parts = {name: with_refused(values, examples, name) for name, values in scored.items()}
    return [
        Sample(
            id=example.id,
            task=task.name,
            video=example.video,
            question=shown_question(task, example),
            answer=answer.text,
            parts={name: float(values[i]) for name, values in parts.items()},
            metrics={name: float(values[i]) for name, values in metrics.items()},
            failure=answer.failure or ("" if answer.text.strip() else NO_TEXT),
            finish_reason=answer.finish_reason,
            num_tokens=answer.num_tokens,
            categories=_by_axis(example.categories),
            **{name: flags[i] for name, flags in forms.items()},
            truth=shown_truth(task, example),
            parsed=shown_answer(answer.text),
            times_s=shown_times_s(example),
        )
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]


def _by_axis(categories: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    by_axis: dict[str, list[str]] = {}
    for axis, value in categories:
        by_axis.setdefault(axis, []).append(value)
    return by_axis


def write_lines(file: Path, rows: Iterable[object]) -> None:
    """One JSON line per row, in place of an older file, whole or not at all. Raises OSError."""
    aside = file.with_name(f"{file.name}.tmp")
    with aside.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(to_json(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)


def read_samples(file: str | Path) -> list[Sample]:
    """The samples of a samples.jsonl. Raises ConfigError with file and line when it is none."""
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read the samples {file}: {reason}; wanted a samples.jsonl of vcr1-fast eval"
        ) from None
    samples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            samples.append(_sample(line, f"{file}:{number}"))
    if not samples:
        raise ConfigError(f"{file} holds no sample, wanted a samples.jsonl of vcr1-fast eval")
    return samples


def _sample(line: str, where: str) -> Sample:
    wanted = {column.name for column in fields(Sample)}
    try:
        row: Any = json.loads(line)
        known = {key: value for key, value in row.items() if key in wanted}
        sample = Sample(**known)
        are_texts = all(isinstance(text, str) for text in (sample.id, sample.task, sample.video))
        if not are_texts or not all(math.isfinite(value) for value in sample.metrics.values()):
            raise ValueError("id, task, video or metrics are of the wrong type")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where} is no line of a samples.jsonl: {error}") from None
    return sample
