"""`vcr1-fast score`: answers that were made elsewhere -> the held-out score that `vcr1-fast eval` would give them.

Answers come as JSONL, one {"id": ..., "answer": ...} a line, from whatever answered: another engine, another evaluation
harness, an API. They are read by the benchmark's published rule (tasks/benchmark_readers.py). Loads no model and no
torch; videos are not read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vcr1_fast.evaluation.samples import Answer, write_lines
from vcr1_fast.evaluation.score_tables import print_scores
from vcr1_fast.evaluation.scores import Scores, score_answers
from vcr1_fast.evaluation.suites import SUITES
from vcr1_fast.evaluation.suites.command import benchmark_score, read_suite
from vcr1_fast.prompts.dataset import AnnotationFile, AnnotationSource, read_annotation_files
from vcr1_fast.run.terminal import console, print_problems
from vcr1_fast.settings.config import ConfigError, JudgeConfig, TaskConfig
from vcr1_fast.settings.io import UsageError, load_settings
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, RefusedTruth, SampleError

MISSING = "there is no answer"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """The settings that a score depends on. recipe paper keeps the ground truth as the file has it."""

    task: TaskConfig = field(default_factory=lambda: TaskConfig(recipe="paper"))
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def score_command(name: str, annotations: Sequence[str], answers: str, overrides: list[str]) -> dict[str, Any]:
    """Prints the table and, on stderr, what is wrong with annotations; returns what the JSON line is to say.

    Args:
        name: of a task, or of a suite whose files are read as they are published.
        overrides: tokens such as --task.recipe=fixed.

    A missing answer and a refused annotation count as wrong. Raises UsageError for an unknown name, ConfigError when a
    file cannot be used or an answer belongs to no example.
    """
    config = load_settings(ScoreConfig, None, overrides)
    tasks = make_tasks(config.task, judge=config.judge)
    if name not in tasks and name not in SUITES:
        raise UsageError(f"there is no task or suite {name!r}; they are {', '.join([*tasks, *SUITES])}")
    examples, errors = _rows_of(name, annotations, tasks, config)
    print_problems(errors, "bad annotation: ")
    if all(example.is_refused for example in examples):
        reason = f"; first error: {errors[0]}" if errors else ""
        raise ConfigError(f"{', '.join(annotations)} holds no usable row of {name}{reason}")
    said = _answers_of(examples, read_answers(answers, examples, f"{name}:"))
    num_missing = sum(answer.failure == MISSING for answer in said)
    if num_missing:
        print(f"{num_missing:,} of {len(examples):,} examples have no answer, counted as wrong", file=sys.stderr)
    scores, samples = score_answers(tasks, examples, said, seed=0, with_samples=name in SUITES)
    if {example.task for example in examples} != set(scores):
        raise ConfigError(f"there is no score of {name}, see the lines above")
    console.print(f"{name}, recipe {config.task.recipe}:", soft_wrap=True, highlight=False, markup=False)
    print_scores({}, scores)
    result = {"name": name, "recipe": config.task.recipe, **_summary(scores), "num_missing": num_missing}
    if name in SUITES and all(sample.metrics for sample in samples):
        result["benchmark_score"] = benchmark_score(samples, SUITES[name].average)[0]  # as the suite takes its mean
    return result


def _summary(scores: Scores) -> dict[str, Any]:
    """For JSON. With several tasks metrics are named task/metric, and shares are of all examples together."""
    total = sum(score.num_examples for score in scores.values())
    per_task = {f"{task}/" if len(scores) > 1 else "": score for task, score in scores.items()}
    return {
        "n": total,
        "metrics": {head + key: value for head, score in per_task.items() for key, value in score.metrics.items()},
        "intervals": {head + key: pair for head, score in per_task.items() for key, pair in score.intervals.items()},
        "readable": _share(scores, "readable", total),
        "well_formed": _share(scores, "well_formed", total),
        "trivial": {head + key: values for head, score in per_task.items() for key, values in score.trivial.items()},
        "num_refused": sum(score.num_refused for score in scores.values()),
    }


def _share(scores: Scores, form: str, total: int) -> float | None:
    """Of all examples; None where a task does not say it."""
    if not all(form in score.forms for score in scores.values()):
        return None
    return sum(score.num_examples * score.forms[form] for score in scores.values()) / total


def read_answers(file: str | Path, examples: Sequence[Example], prefix: str = "") -> dict[str, str]:
    """Id of an example -> what was said to it. An id may leave out `prefix`, which its suite puts before all of them.

    Raises ConfigError when the file cannot be read. A line that is no answer, to no example or to one that has an
    answer already is named on stderr, and then ConfigError is raised as well: a score without it would be wrong. An
    answer to no example may be one to a refused row, whose own id is not known: as many of them are passed over.
    """
    known = {example.id.removeprefix(prefix): example.id for example in examples} | {ex.id: ex.id for ex in examples}
    lines: dict[str, int] = {}
    said: dict[str, str] = {}
    problems: list[str] = []
    unknown: list[str] = []
    for number, line in _lines(file):
        try:
            name, text = _answer(line)
            if name not in known:
                unknown.append(f"{file}:{number}: no example has the id {name!r:.60}")
                continue
            if known[name] in lines:
                raise ValueError(f"id {name!r:.60} is answered in line {lines[known[name]]} already")
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
        else:
            lines[known[name]], said[known[name]] = number, text
    num_refused = sum(example.is_refused for example in examples)
    if len(unknown) > num_refused:
        problems = unknown + problems
    elif unknown:
        print_problems([f"{line}; passed over, as {num_refused:,} rows are refused" for line in unknown])
    if problems:
        print_problems(problems)
        raise ConfigError(f"{len(problems):,} lines of {file} cannot be used, see above: nothing was scored")
    return said


def _lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the answers {file}: {reason}; wanted JSONL in UTF-8") from None
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _answer(line: str) -> tuple[str, str]:
    """Id and text of a line. Raises ValueError."""
    wanted = 'wanted {"id": ..., "answer": "..."}'
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error}, {wanted}") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"the line is a {type(row).__name__}, {wanted}")
    name, text = row.get("id"), row.get("answer")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"id is {name!r:.60}, {wanted}")
    if not isinstance(text, str):
        raise ValueError(f"answer is {text!r:.60}, {wanted}")
    return str(name), text


def _answers_of(examples: Sequence[Example], said: Mapping[str, str]) -> list[Answer]:
    def answer(example: Example) -> Answer:
        if isinstance(example.truth, RefusedTruth):
            return Answer("", f"the annotation was refused: {example.truth.reason}")
        return Answer(said[example.id]) if example.id in said else Answer("", MISSING)

    return [answer(example) for example in examples]


def _rows_of(
    name: str, files: Sequence[str], tasks: Mapping[str, Task], config: ScoreConfig
) -> tuple[list[Example], list[SampleError]]:
    """The rows of a task in annotation files, or those that `vcr1-fast suite` would write, read back."""
    recipe = config.task.recipe
    if name in tasks:
        sources = [AnnotationSource(file, task=name) for file in files]
        rows, errors = _rows(read_annotation_files(sources, tasks, recipe))
        return [row for row in rows if row.task == name], errors
    found = read_suite(name, files)
    left_out = found.errors[: len(found.errors) - found.num_refused]  # the others are named once more below
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.jsonl"
        write_lines(file, found.rows)
        rows, errors = _rows(read_annotation_files([AnnotationSource(file)], tasks, recipe))
    return rows, [*left_out, *errors]


def _rows(contents: Sequence[AnnotationFile]) -> tuple[list[Example], list[SampleError]]:
    errors = [error for content in contents for error in content.errors]
    return [row for content in contents for row in content.rows], errors
