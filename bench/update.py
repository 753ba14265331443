"""`python -m bench update`: one GRPO update and one whole step, TRL's own trainer, the original's recipe and ours.

A step is the prompt, G answers, their rewards and one update; the update is its loss, backward, clipping and optimizer.
Before a time is shown, loss and every gradient of each way are compared on the same answers with G separate rows in
float64. Then the ways take turns. Last, each takes one step under torch's profiler, which counts the bytes of the
tensors that are alive at a time.

Growth: the exponent e of step ms = c G^e, by least squares on logarithms, over answers G = 2, 4, 8.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch

from bench.harness import Deadline, Findings, allocated_peak, reason_of, summarize
from bench.harness import disagreements as failed  # noqa: F401  # asked by bench/__main__.py
from bench.scaling import slope
from bench.step_timing import distance
from bench.update_problem import LAYOUTS, POINTS, Layout, Point, Problem, StepResult, group_of
from bench.update_report import COLUMN_HEADS as COLUMN_HEADS
from bench.update_report import CONDITIONS, print_update_report
from bench.update_ways import WAYS, WayKind, plain_update
from vcr1_fast.learner.model import load_tokenizer

MAX_ROUNDS = 5
CHECK_FACTOR = 2.0  # a way's error may be this many times that of G separate rows in float32
ROUNDING = 2.0**-24  # of a float32 below 1
GROWTH = (2, 4, 8)
GROWTH_ROUNDS = 3
SECONDS = 420.0
Row = dict[str, Any]


@dataclass
class Runner:
    """One opened way at one point."""

    kind: WayKind
    way: Any
    loss_error: float = math.nan
    gradient_error: float = math.nan
    steps: list[StepResult] = field(default_factory=list)

    def median_ms(self, part: str = "total_ms") -> float:
        return summarize([getattr(step, part) for step in self.steps]).median_ms


@dataclass
class Session(Findings):
    tokenizer: Any
    max_rounds: int
    growth: list[Row] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--points", type=int, nargs="+", choices=POINTS, default=list(POINTS), help="prompt tokens P")
    parser.add_argument("--rounds", type=int, default=MAX_ROUNDS, help="at most this many timed steps of each way")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="budget; what does not fit is left out by name")
    parser.add_argument("--no-growth", action="store_true", help="without the steps of 2 and 4 answers")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points that fit; returns what the JSON line holds."""
    session = Session(load_tokenizer("tiny"), arguments.rounds, deadline=Deadline(arguments.seconds))
    points = [POINTS[length] for length in sorted(arguments.points)]
    with session.deadline.until_stopped():
        measure(session, points, has_growth=not arguments.no_growth)
    session.absent.append({"way": "verl", "reason": why_no_verl()})
    result = {
        "model": "tiny",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "conditions": CONDITIONS,
        **session.as_json(),
        "growth": session.growth,
    }
    print_update_report(result)
    return result


def measure(session: Session, points: list[Point], *, has_growth: bool) -> None:
    for point in points:
        for layout in LAYOUTS:
            problem = Problem(point, layout, session.tokenizer)
            runners = open_ways(session, problem)
            check(session, problem, runners)
            time_steps(session, runners, point.name, session.max_rounds)
            session.rows += rows_of(problem, runners)
            close(runners)
    if has_growth:
        measure_growth(session, points[-1])


def open_ways(session: Session, problem: Problem) -> list[Runner]:
    """Those of a layout that can be opened; the others go to `absent`."""
    runners = []
    for kind in WAYS:
        if kind.layout != problem.layout:
            continue
        try:
            runners.append(Runner(kind, kind.open(problem)))
        except ImportError as error:
            session.absent.append({"way": kind.name, "reason": reason_of(error)})
    return runners


def close(runners: list[Runner]) -> None:
    for runner in runners:
        runner.way.close()


def check(session: Session, problem: Problem, runners: list[Runner]) -> None:
    """Loss and gradients of each way on the answers that the first one draws. This also warms all of them up."""
    first = runners[0].way.step(0, wants_gradients=True)
    group = group_of(problem.prompt(), first.completion_ids)
    wide_loss, expected = plain_update(group, torch.float64)
    _, plain = plain_update(group, torch.float32)
    loss_bound = advantage_rounding(group.rewards)
    bound = CHECK_FACTOR * distance(plain, expected) + loss_bound
    for runner in runners:
        loss, gradients = first.loss, first.gradients
        if runner is not runners[0]:
            loss, gradients = runner.way.update(group, wants_gradients=True)
        step = first if runner is runners[0] else runner.way.step(0)
        runner.loss_error = abs(loss - wide_loss)
        runner.gradient_error = distance(gradients, expected)
        label = f"{runner.kind.name} at {problem.point.name}, {problem.layout}"
        if not runner.gradient_error <= bound or not runner.loss_error <= loss_bound:
            session.disagreements.append(
                f"{label}: gradient off by {runner.gradient_error:.2e} (bound {bound:.2e}), loss by "
                f"{runner.loss_error:.2e} (bound {loss_bound:.2e})"
            )
        lengths = sorted({len(ids) for ids in step.completion_ids})
        if step.prompt_ids != first.prompt_ids or lengths != [problem.point.completion_len]:
            session.disagreements.append(f"{label}: answers of {lengths} tokens, or not on the same prompt")


def advantage_rounding(rewards: tuple[float, ...]) -> float:
    """What an advantage (r - mean) / std may be off by in float32, in which TRL has it: reward, mean, difference and
    quotient round once each, rewards below 1. The loss of an on-policy step is the mean of the advantages, and its
    gradient a sum over them."""
    return 4 * ROUNDING / statistics.stdev(rewards)


def time_steps(session: Session, runners: list[Runner], name: str, max_rounds: int) -> None:
    """Rounds in which each way takes one step, at least one."""
    for index in range(max_rounds):
        round_s = sum(runner.steps[-1].total_ms for runner in runners if runner.steps) / 1e3
        if index and not session.deadline.allows(f"{name}: round {index + 1}", round_s):
            break
        for runner in runners:
            runner.steps.append(runner.way.step(index + 1))


def rows_of(problem: Problem, runners: list[Runner]) -> list[Row]:
    """Everything that is reported of one point and layout."""
    peaks = [allocated_peak(lambda way=runner.way: way.step(1)) for runner in runners]
    [ours] = [index for index, runner in enumerate(runners) if runner.kind.name == "ours"]
    point, rows = problem.point, []
    for runner, peak in zip(runners, peaks, strict=True):
        row: Row = {
            "way": runner.kind.name,
            "layout": problem.layout,
            "prompt_tokens": point.prompt_len,
            "completion_tokens": point.completion_len,
            "group_size": point.num_completions,
            "loss_error": runner.loss_error,
            "gradient_error": runner.gradient_error,
            "repeats": len(runner.steps),
            "peak_bytes": peak,
            "peak_ratio": peak / peaks[ours],
        }
        for part in ("total_ms", "update_ms"):
            timing = summarize([getattr(step, part) for step in runner.steps])
            name = "step" if part == "total_ms" else "update"
            row |= {f"{name}_ms": timing.median_ms, f"{name}_low_ms": timing.low_ms, f"{name}_high_ms": timing.high_ms}
            row[f"{name}_ratio"] = timing.median_ms / runners[ours].median_ms(part)
        rows.append(row)
    return rows


def measure_growth(session: Session, point: Point) -> None:
    """Step times over G at one P; those of the largest G come from the rows."""
    times: dict[tuple[Layout, str], dict[int, float]] = {}
    for row in session.rows:
        if row["prompt_tokens"] == point.prompt_len:
            times[row["layout"], row["way"]] = {row["group_size"]: row["step_ms"]}
    for size in GROWTH:
        if size == point.num_completions:
            continue
        for layout in LAYOUTS:
            problem = Problem(replace(point, num_completions=size), layout, session.tokenizer)
            runners = open_ways(session, problem)
            for runner in runners:
                runner.way.step(0)
            time_steps(session, runners, problem.point.name, min(GROWTH_ROUNDS, session.max_rounds))
            for runner in runners:
                times[layout, runner.kind.name][size] = runner.median_ms()
            close(runners)
    for (layout, way), by_size in times.items():
        exponent, _ = slope(list(by_size), list(by_size.values()))
        steps_ms = {str(size): by_size[size] for size in sorted(by_size)}
        session.growth.append(
            {"way": way, "layout": layout, "prompt_tokens": point.prompt_len, "step_ms": steps_ms, "exponent": exponent}
        )


def why_no_verl() -> str:
    """verl's FSDP actor is compared where it runs, which is not here: its engines are registered for CUDA and NPU."""
    try:
        wanted = [line for line in metadata.requires("verl") or () if line.startswith("transformers")]
    except metadata.PackageNotFoundError:
        return "not installed; its FSDP actor is for CUDA and NPU devices alone"
    here = f"{metadata.version('verl')} asks for {wanted[0]}, here is {metadata.version('transformers')}"
    return f"its FSDP actor is for CUDA and NPU devices alone; and {here}"
