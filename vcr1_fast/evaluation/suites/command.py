"""`vcr1-fast suite`: public benchmarks in their published files -> one JSONL file of our own rows for data.eval.

Each row gets "categories", an object of axis -> value or list of values (a question may have several tags), by which
`vcr1-fast eval` makes further tables and `benchmark_score` the benchmark's own mean. "suite" is one of them: several
suites may be asked in one run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vcr1_fast.evaluation.samples import Sample, read_samples, write_lines
from vcr1_fast.evaluation.suites import SUITES
from vcr1_fast.evaluation.suites.subtitles import Subtitles
from vcr1_fast.evaluation.suites.suite import Suite
from vcr1_fast.prompts.schemas.schema import Recipe, Row
from vcr1_fast.run.terminal import print_problems
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import task_class
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import SampleError
from vcr1_fast.video.source_name import SourceName


@dataclass(frozen=True)
class SuiteRows:
    """What became of the files of a suite."""

    rows: list[Row]  # those that eval will have to refuse, and count as wrong, among them
    errors: list[SampleError]  # one per row left out or to be refused
    num_refused: int  # of the rows


def read_suite(
    suite: str,
    files: Sequence[str | Path],
    videos: str | Path | None = None,
    only: Mapping[str, str] | None = None,
    subtitles: Subtitles | None = None,
) -> SuiteRows:
    """Rows of all files. Video files are not opened, unless the subtitles of their frames are asked for.

    Args:
        videos: the folder of the videos, by default that of the first file.
        only: category axis -> wanted value, for example {"duration": "short"}.

    Raises ConfigError when a file cannot be read, is not of the suite, or nothing usable is left.
    """
    paths = [Path(os.path.expanduser(file)) for file in files]
    root = Path(os.path.expanduser(videos)) if videos is not None else paths[0].parent
    rows: list[Row] = []
    errors: list[SampleError] = []
    source_of_id: dict[str, str] = {}
    for source, row in SUITES[suite].read(paths, root):
        if isinstance(row, ValueError):
            errors.append(SampleError(source, str(row)))
        elif (name := str(row["id"])) in source_of_id:
            errors.append(SampleError(source, f"id {name!r} is already taken by {source_of_id[name]}"))
        else:
            source_of_id[name] = source
            rows.append(row)
    rows = _only(rows, only or {})
    if subtitles is not None:
        rows = list(_with_subtitles(rows, subtitles, source_of_id, errors))
    refused = [SampleError(source_of_id[str(row["id"])], reason) for row in rows if (reason := _defect(row))]
    if len(refused) == len(rows):
        first = next(iter([*errors, *refused]), None)
        raise ConfigError(
            f"no usable row of {suite} in {', '.join(map(str, files))}" + (f"; first error: {first}" if first else "")
        )
    return SuiteRows(rows, errors + refused, len(refused))


def _with_subtitles(
    rows: Sequence[Row], subtitles: Subtitles, source_of_id: Mapping[str, str], errors: list[SampleError]
) -> Iterator[Row]:
    for row in rows:
        try:
            yield subtitles.added(row)
        except ValueError as error:
            errors.append(SampleError(source_of_id[str(row["id"])], str(error)))


def _only(rows: list[Row], only: Mapping[str, str]) -> list[Row]:
    for axis, value in only.items():
        known = sorted({known for row in rows for known in _values(row, axis)})
        if value not in known:
            raise ConfigError(f"no row has {axis}={value}; {axis} is one of: {', '.join(known) or 'nothing'}")
        rows = [row for row in rows if value in _values(row, axis)]
    return rows


def _values(row: Row, axis: str) -> list[str]:
    found = _categories(row).get(axis, [])
    return found if isinstance(found, list) else [found]


def _categories(row: Row) -> dict[str, Any]:
    categories = row.get("categories", {})
    assert isinstance(categories, dict)
    return categories


def _defect(row: Row) -> str:
    """Why neither recipe takes the truth of the row; "" where one does."""
    try:
        _task(str(row["task"]), "fixed").parse_truth(row)
    except ValueError as error:
        try:  # such as a period that ends before it starts
            _task(str(row["task"]), "paper").parse_truth(row)
        except ValueError:
            return f"{error}; eval will count it as wrong"
    return ""


@lru_cache
def _task(name: str, recipe: Recipe) -> Task:
    return task_class(name)(TaskConfig(recipe=recipe))


def suite_command(
    suite: str,
    files: Sequence[str],
    output: str,
    videos: str | None,
    only: Mapping[str, str],
    subtitles: Subtitles | None = None,
) -> dict[str, Any]:
    """Writes the rows to `output`, bad ones to stderr; returns the counts. Raises ConfigError or OSError."""
    found = read_suite(suite, files, videos, only, subtitles)
    print_problems(found.errors, "bad annotation: ", more="bad annotation:")
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_lines(target, [row | {"categories": {"suite": suite, **_categories(row)}} for row in found.rows])
    paths = {SourceName.parse(str(row["video"])).path for row in found.rows}
    counts: dict[str, Any] = {
        "rows": len(found.rows),
        "refused": found.num_refused,
        "left_out": len(found.errors) - found.num_refused,
        "videos": len(paths),
        "missing_videos": sum(not os.path.exists(path) for path in paths),
    }
    if subtitles is not None:
        counts["without_subtitles"] = subtitles.num_without
    return {"suite": suite, "output": output, **counts}


def print_suites() -> None:
    """All suites, with what each reads and where its rules stand."""
    for suite in SUITES.values():
        print(f"{suite.name}: {suite.title}")
        for what, text in describe(suite).items():
            print(f"  {what:8s}{text}")


def describe(suite: Suite) -> dict[str, str]:
    """What there is to say of a suite, short name -> text."""
    return {
        "task": ", ".join(suite.tasks),
        "files": suite.files,
        "metric": suite.metric,
        "format": suite.format_source,
        "rule": suite.rule_source,
        "checked": suite.checked,
    }


def score_command(suite: str, samples: str) -> dict[str, Any]:
    """The benchmark's own mean of its samples in a samples.jsonl that `vcr1-fast eval` wrote. Raises ConfigError."""
    found = [sample for sample in read_samples(samples) if sample.categories.get("suite") == [suite]]
    if not found or not all(sample.metrics for sample in found):
        raise ConfigError(
            f"{samples} holds {len(found)} samples of {suite}, {sum(not sample.metrics for sample in found)} of them "
            "without a metric; wanted some, and a metric of each"
        )
    score, by_value = benchmark_score(found, SUITES[suite].average)
    return {"suite": suite, "score": score, "n": len(found), "by": by_value}


def benchmark_score(samples: Sequence[Sample], axes: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The mean over the values of the first axis of the mean over those of the next ..., of each sample's first metric.

    And the means of the first axis. Without axes: the mean over samples. Raises ConfigError where a sample lacks one.
    """
    if not axes:
        return sum(next(iter(sample.metrics.values())) for sample in samples) / len(samples), {}
    members: dict[str, list[Sample]] = {}
    for sample in samples:
        if axes[0] not in sample.categories:
            raise ConfigError(f"sample {sample.id} has no category {axes[0]}, by which the benchmark averages")
        for value in sample.categories[axes[0]]:
            members.setdefault(value, []).append(sample)
    means = {value: benchmark_score(own, axes[1:])[0] for value, own in sorted(members.items())}
    return sum(means.values()) / len(means), means
