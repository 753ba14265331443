"""Curves as SVG paths: which metrics are drawn, in which section, and where each point lies. Plain numbers and text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vcr1_fast.run.metric_names import metric_of
from vcr1_fast.run.step_line import WINDOW, number

WIDTH, HEIGHT = 360.0, 150.0  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48.0, 352.0, 8.0, 126.0  # of the part with the curves
MAX_POINTS = 400  # of a line; neighbours are averaged above
SECTIONS = (  # title, beginnings of the names in it
    ("Rewards", ("reward", "rewards/", "reward_std", "frac_reward_zero_std", "nll")),
    ("Held-out scores", ("eval/",)),
    ("Lengths of answers", ("completions/mean_length", "completions/max_length", "completions/clipped_ratio")),
    ("The update", ("entropy", "clip_ratio/region_mean", "kl", "grad_norm", "loss", "learning_rate")),
    (
        "Engine and learner",
        ("sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/", "sampling/policy_lag/mean"),
    ),
    ("Throughput", ("step_time", "tokens_per_s/", "busy_frac")),
)
SPANS = ("prompts", "rollout", "update", "weight_sync")  # that a step's own time is made of

Series = Sequence[tuple[int, float]]  # (step, value), ascending


@dataclass(frozen=True)
class Line:
    """One run's part of a chart: paths in the units of the drawing; "" where the run has not logged the metric."""

    raw: str
    smooth: str  # trailing mean of the last WINDOW steps
    dots: list[tuple[float, float]]  # of a line that is too short to be seen as one
    last: str


@dataclass(frozen=True)
class Chart:
    """One metric of one run or two."""

    name: str
    caption: str
    lines: list[Line]
    low: str  # labels of the axes
    high: str
    first_step: int
    last_step: int


def sections(runs: Sequence[Mapping[str, Series]]) -> list[tuple[str, list[Chart]]]:
    """Title -> charts of the metrics that at least one run has logged; sections without one are left out."""
    names = sorted({name for run in runs for name in run})
    found = []
    for title, beginnings in SECTIONS:
        wanted = [name for start in beginnings for name in names if _belongs(name, start)]
        charts = [made for name in dict.fromkeys(wanted) if (made := chart(name, [run.get(name, ()) for run in runs]))]
        if charts:
            found.append((title, charts))
    return found


def _belongs(name: str, start: str) -> bool:
    if name.startswith("rewards/") and name.endswith("/std"):
        return False
    return name.startswith(start) if start.endswith("/") else name == start


def chart(name: str, lines: Sequence[Series]) -> Chart | None:
    """The lines of all runs on the same axes; None without a finite value."""
    finite = [[(step, value) for step, value in line if math.isfinite(value)] for line in lines]
    points = [point for line in finite for point in line]
    if not points:
        return None
    steps, values = [step for step, _ in points], [value for _, value in points]
    frame = Frame(min(steps), max(steps), min(values), max(values))
    known = metric_of(name)
    return Chart(
        name,
        known.meaning if known else "",
        [_line(line, frame) for line in finite],
        number(frame.low),
        number(frame.high),
        frame.first,
        frame.last,
    )


@dataclass(frozen=True)
class Frame:
    """What the edges of the part with the curves stand for."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        """A single step lies in the middle."""
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return round(LEFT + share * (RIGHT - LEFT), 1)

    def y(self, value: float) -> float:
        """Upwards; a constant lies in the middle."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """`M48.0,126.0 L352.0,8.0` of (step, value) pairs; "" without any."""
        return " ".join(f"{'L' if i else 'M'}{self.x(step)},{self.y(value)}" for i, (step, value) in enumerate(points))


def _line(series: Series, frame: Frame) -> Line:
    if not series:
        return Line("", "", [], "")
    raw = thinned(series)
    dots = [(frame.x(step), frame.y(value)) for step, value in raw] if len(raw) <= WINDOW else []
    return Line(frame.path(raw), frame.path(thinned(smoothed(series))), dots, number(series[-1][1]))


def smoothed(series: Series, window: int = WINDOW) -> list[tuple[int, float]]:
    """Each value with the mean of itself and the window - 1 before it (fewer at the start)."""
    values = [value for _, value in series]
    return [
        (step, math.fsum(values[max(i + 1 - window, 0) : i + 1]) / min(i + 1, window))
        for i, (step, _) in enumerate(series)
    ]


def thinned(series: Series, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of as many neighbours."""
    count = min(limit, len(series))
    edges = [len(series) * i // count for i in range(count + 1)] if count else []
    parts = [series[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


@dataclass(frozen=True)
class Span:
    """A part of the mean step."""

    name: str
    meaning: str
    seconds: float
    start_frac: float
    frac: float


def time_split(run: Mapping[str, Series]) -> list[Span]:
    """How the mean step spends its time: the spans of SPANS that were logged, and the rest of step_time."""
    whole_s = _mean(run.get("step_time", ()))
    if whole_s <= 0:
        return []
    parts = {name: _mean(run.get(f"time/{name}_s", ())) for name in SPANS if run.get(f"time/{name}_s")}
    parts["other"] = max(whole_s - math.fsum(parts.values()), 0.0)
    total_s, start = math.fsum(parts.values()), 0.0
    spans = []
    for name, seconds in parts.items():
        known = metric_of(f"time/{name}_s")
        meaning = known.meaning if known else "metrics, records, and what is in no span"
        spans.append(Span(name, meaning, seconds, start / total_s, seconds / total_s))
        start += seconds
    return spans


def _mean(series: Series) -> float:
    return math.fsum(value for _, value in series) / len(series) if series else 0.0
