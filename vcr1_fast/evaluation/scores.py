"""Scores of every task, made from answers: what a run logs, prints (score_tables) and keeps in scores.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vcr1_fast.evaluation.answer_forms import answer_forms
from vcr1_fast.evaluation.samples import (
    Answer,
    Sample,
    make_samples,
    metric_intervals,
    of_all,
    per_sample_metrics,
    with_refused,
)
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example


@dataclass(frozen=True)
class TaskScore:
    """Metrics of one task on one set of examples; every value in [0, 1], headline first."""

    metrics: dict[str, float]
    trivial: dict[str, dict[str, float]]  # baseline -> metrics, with the same denominator
    num_examples: int  # all of them, the two kinds of failures included
    num_bad: int  # examples whose video could not be read; they count as wrong
    num_refused: int = 0  # examples whose annotation cannot be used; they count as wrong, for the baselines as well
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of metrics that are means
    readable: float | None = None  # share of all examples whose answer the benchmark's reader reads; None: not said
    well_formed: float | None = None  # share of all examples whose answer has the form that the reward asks for

    @property
    def forms(self) -> dict[str, float]:
        """The shares of readable and of well-formed answers, where they are known."""
        both = {"readable": self.readable, "well_formed": self.well_formed}
        return {name: share for name, share in both.items() if share is not None}


Scores = dict[str, TaskScore]


def score_answers(
    tasks: Mapping[str, Task],
    examples: Sequence[Example],
    answers: Sequence[Answer],
    seed: int,
    *,
    with_samples: bool = False,
) -> tuple[Scores, list[Sample]]:
    """Scores of every task, and with `with_samples` one sample per example, task after task.

    A failure is scored as the empty answer, which is 0 in every metric, and stays in the denominator. A refused example
    has no truth to score against: its 0 is averaged in. A task without a usable example, or whose metrics raise, has no
    score, and says so.
    """
    scores: Scores = {}
    samples: list[Sample] = []
    for name in dict.fromkeys(example.task for example in examples):
        members = [i for i, example in enumerate(examples) if example.task == name]
        everyone, said = [examples[i] for i in members], [answers[i] for i in members]
        if all(example.is_refused for example in everyone):
            print(f"no score of task {name}: all of its {len(members)} held-out rows are refused", file=sys.stderr)
            continue
        try:
            forms = answer_forms(tasks[name], everyone, said)
            scores[name], columns = _score_task(tasks[name], everyone, said, forms, seed)
            if with_samples:
                samples += make_samples(tasks[name], everyone, said, columns, forms)
        except (Exception, SystemExit) as error:  # user code; a score that is lost must not end the training
            scores.pop(name, None)
            print(f"no score of task {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return scores, samples


def _score_task(
    task: Task,
    everyone: Sequence[Example],
    answers: Sequence[Answer],
    forms: Mapping[str, Sequence[bool]],
    seed: int,
) -> tuple[TaskScore, dict[str, list[float]]]:
    """The score, and the metrics of each example. At least one of them is not refused."""
    usable = [i for i, example in enumerate(everyone) if not example.is_refused]
    own, texts = [everyone[i] for i in usable], [answers[i].text for i in usable]
    metrics, share = task.metrics(own, texts), len(usable) / len(everyone)
    columns = per_sample_metrics(task, own, texts, metrics)
    values = {metric: with_refused(column, everyone, metric) for metric, column in columns.items()}
    trivial = {label: task.metrics(own, given) for label, given in task.trivial_answers(own).items()}
    score = TaskScore(
        metrics=of_all(metrics, share),
        trivial={label: of_all(baseline, share) for label, baseline in trivial.items()},
        num_examples=len(everyone),
        num_bad=sum(bool(answers[i].failure) for i in usable),
        num_refused=len(everyone) - len(usable),
        intervals=metric_intervals(values, [" ".join(example.sources) or example.id for example in everyone], seed),
        **{name: sum(flags) / len(everyone) for name, flags in forms.items()},
    )
    return score, values


def flat_scores(scores: Scores) -> dict[str, float]:
    """`task/metric` -> value, and the shares of readable and well-formed answers, for logs."""
    return {
        f"{task}/{name}": value
        for task, score in scores.items()
        for name, value in (score.metrics | score.forms).items()
    }


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """For JSON: task -> metrics, their 95 % intervals, baselines and counts."""
    return {task: asdict(score) for task, score in scores.items()}


def scores_from_dict(scores: Mapping[str, Any]) -> Scores:
    """What `scores_as_dict` was given, from JSON."""
    return {task: TaskScore(**score) for task, score in scores.items()}
