"""What a run's folder holds, read for a report: settings, metrics, held-out scores, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vcr1_fast.commands.watch import RunRecord
from vcr1_fast.evaluation.samples import Sample, read_samples
from vcr1_fast.settings.error import ConfigError

RESULT = "result.json"  # what the command `train` returns, and its version
SETTINGS = (  # those a reader asks for first
    ("model", "path"),
    ("train", "num_steps"),
    ("train", "prompts_per_step"),
    ("rollout", "group_size"),
    ("rollout", "temperature"),
    ("rollout", "max_new_tokens"),
    ("rollout", "engine"),
    ("algorithm", "loss"),
    ("algorithm", "beta"),
    ("algorithm", "scale_advantages"),
    ("optimizer", "learning_rate"),
    ("task", "recipe"),
    ("task", "think"),
    ("data", "train"),
    ("data", "eval"),
    ("video", "fps"),
    ("video", "max_frames"),
    ("video", "image_folder_fps"),
    ("train", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class Said(Sample):
    """One answer to one question, from an evaluation or from training."""

    score: float  # the headline metric where it was evaluated, the reward where it was trained on
    score_name: str
    note: str = ""  # why there is no answer


@dataclass(frozen=True)
class Row:
    """One metric of the table of held-out scores. None: not known."""

    task: str
    metric: str
    before: float | None
    after: float | None
    before_interval: tuple[float, float] | None = None  # 95 %, as after_interval
    after_interval: tuple[float, float] | None = None
    trivial: dict[str, float] = field(default_factory=dict)  # baseline -> value


@dataclass(frozen=True)
class Evaluation:
    """A folder that `vcr1-fast eval` wrote."""

    name: str
    scores: list[Row]  # in `after`
    said: list[Said]


@dataclass(frozen=True)
class RunData:
    """All that a report says of a run."""

    folder: Path
    settings: dict[str, str]
    version: str  # "" where the run has not written its result yet
    num_steps_done: int
    series: dict[str, list[tuple[int, float]]]  # metric -> (step, value), by step
    scores: list[Row]
    evaluations: list[Evaluation]  # oldest first
    trained_on: list[Said]  # of the last step that was kept

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: str | Path) -> RunData:
    """Read what is there. Raises ConfigError when `folder` is none of a run; what is damaged in it is left out."""
    record = RunRecord(folder)
    record.read_on()
    result = _read_json(Path(folder) / RESULT)
    if result.get("steps") != record.step:  # of an earlier end: the run has been gone on with since, or begun anew
        result = {}
    series = series_of(record.records)
    evaluations = list(_evaluations(Path(folder)))
    return RunData(
        Path(folder),
        _settings(Path(folder)),
        str(result.get("version", "")),
        record.step,
        series,
        score_rows(result, series),
        evaluations,
        _last_samples(Path(folder) / "samples"),
    )


def series_of(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metric -> its values with their steps, ascending; of a step that was written twice the last counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        for name, value in record.items():
            if isinstance(step, int) and isinstance(value, int | float) and name != "step":
                found.setdefault(name, {})[step] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def score_rows(result: Mapping[str, Any], series: Mapping[str, list[tuple[int, float]]]) -> list[Row]:
    """From result.json; of a run that has not ended from its log, the first score and the last, without intervals."""
    before, after = _mapping(result.get("before")), _mapping(result.get("after"))
    if after:
        return [
            row
            for task, score in after.items()
            for row in _task_rows(task, _mapping(before.get(task)), _mapping(score))
        ]
    rows = []
    for name, values in series.items():
        kind, _, rest = name.partition("/")
        if kind == "eval":
            task, _, metric = rest.partition("/")
            rows.append(Row(task, metric, values[0][1], values[-1][1] if len(values) > 1 else None))
    return rows


def _task_rows(task: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Row]:
    old = _mapping(before.get("metrics"))
    intervals = [_mapping(score.get("intervals")) for score in (before, after)]
    for metric, value in _mapping(after.get("metrics")).items():
        trivial = {name: _mapping(scores).get(metric) for name, scores in _mapping(after.get("trivial")).items()}
        before_interval, after_interval = (_interval(interval.get(metric)) for interval in intervals)
        values = _number(old.get(metric)), _number(value)
        yield Row(task, metric, *values, before_interval, after_interval, _numbers(trivial))


def _settings(folder: Path) -> dict[str, str]:
    """Those of SETTINGS that config.yaml has."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {}
    for section, name in SETTINGS:
        values = _mapping(_mapping(config).get(section))
        if name in values:
            found[f"{section}.{name}"] = str(values[name])
    return found


def _evaluations(folder: Path) -> Iterator[Evaluation]:
    scored = [path for path in (folder / "eval").glob("*/scores.json") if (path.parent / "samples.jsonl").is_file()]
    for path in sorted(scored, key=lambda path: path.stat().st_mtime):
        content = _read_json(path)
        try:
            samples = read_samples(path.parent / "samples.jsonl")
        except ConfigError:
            continue
        said = [
            Said(
                **asdict(replace(sample, parts=_numbers(sample.parts))),
                score=next(iter(sample.metrics.values()), 0.0),
                score_name=next(iter(sample.metrics), "no metric"),
                note=sample.failure,
            )
            for sample in samples
        ]
        scores = score_rows({"after": content.get("scores")}, {})
        yield Evaluation(str(content.get("model", path.parent.name)), scores, said)


def _last_samples(folder: Path) -> list[Said]:
    """The best drawn answer of each group of the last step whose samples were kept."""
    steps = {path.stem.removeprefix("step_"): path for path in folder.glob("step_*.jsonl")}
    numbers = [int(step) for step in steps if step.isdecimal()]
    if not numbers:
        return []
    said: list[Said] = []
    for line in steps[str(max(numbers))].read_text("utf-8", "replace").splitlines():
        try:
            said.append(_said_in_training(json.loads(line)))
        except (ValueError, KeyError, TypeError):  # torn, or of another release
            continue
    return said


def _said_in_training(row: Mapping[str, Any]) -> Said:
    drawn = [answer for answer in row["answers"] if answer["is_sampled"]]
    best = max(drawn, key=lambda answer: answer["reward"])
    return Said(
        id=row["id"],
        task=row["task"],
        video=row["video"],
        question=row["question"],
        answer=best["text"],
        parsed=best["parsed"],
        truth=row["truth"],
        score=float(best["reward"]),
        score_name="reward",
        parts=_numbers(best["parts"]),
        metrics={},
        failure="",
        finish_reason=best.get("finish_reason", ""),
        num_tokens=best["num_tokens"],
        times_s=row["times_s"],
        note=f"the best of {len(drawn)} answers of step {row['step']}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _numbers(values: object) -> dict[str, float]:
    """Those of a mapping: null, which stands for NaN, is left out."""
    return {name: value for name, value in _mapping(values).items() if isinstance(value, int | float)}


def _interval(value: object) -> tuple[float, float] | None:
    ends = [_number(end) for end in value] if isinstance(value, list) else []
    low, high = ends if len(ends) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
