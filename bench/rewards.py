"""Rewards of a step: completions per second of the original's way, of our plain Python and of the compiled module.

From the same texts and truths to the format and IoU rewards of `recipe: paper` and the advantages in groups of 8. The
rewards are compared before anything is timed: ours bit for bit, the original's to 1e-12.

original  what VideoChat-R1 (arXiv 2504.06958) does: regular expressions, ast.literal_eval, a loop over the samples
plain     the functions that define what is correct, `native.status()` aside
tasks     what a run does: compiled readers, overlaps and advantages of the CPU half
cuda      what a run on a GPU does: the same with overlaps and advantages of the CUDA half, transfers included
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench import reward_answers
from bench.columns import cell_heads, cell_table
from bench.harness import summarize
from vcr1_fast import native
from vcr1_fast.tasks import answers_batch, overlap, reward_groups
from vcr1_fast.tasks.native_cuda import OnCuda
from vcr1_fast.types import Box, Interval

COUNTS = (64, 512, 4096)
GROUP_SIZE = 8
MIN_SAMPLE_S = 0.01  # a timed sample repeats a call until it takes this long

Scores = tuple[list[float], list[float], list[float]]  # format, iou, advantage of each answer
Way = Callable[[], Scores]


CELLS = {
    "task": ("whose rewards", "{task}"),
    "N": ("answers scored at once", "{completions}"),
    "way": ("the original's, or one of ours", "{way}"),
    "ms": ("median, of all N", "{median_ms:.3f}"),
    "quartiles": ("of that", "{low_ms:.3f}-{high_ms:.3f}"),
    "answers/s": ("by the median", "{completions_per_s:,.0f}"),
    "speed-up": ("times faster than the original's way", "{speedup:.1f}"),
}
COLUMN_HEADS = cell_heads(CELLS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="timed samples of each way; the median counts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every task and number of completions; `rows` holds one entry per task, count and way."""
    rows = [
        row for task in ("grounding", "tracking") for count in COUNTS for row in measure(task, count, arguments.repeats)
    ]
    title = f"rewards of N completions (compiled module: {native.status()})"
    Console().print(cell_table(title, CELLS, rows, ("task", "way")))
    return {"rows": rows}


def measure(task: str, count: int, repeats: int) -> list[dict[str, Any]]:
    """Times of all ways on one batch. Raises ValueError when two of them disagree."""
    ways, num_chars = ways_of(task, count)
    check_agreement(ways)
    samples_ms: dict[str, list[float]] = {name: [] for name in ways}
    num_calls = {name: max(1, int(MIN_SAMPLE_S / timed_s(way, 1))) for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            samples_ms[name].append(timed_s(way, num_calls[name]) / num_calls[name] * 1e3)
    timings = {name: summarize(samples) for name, samples in samples_ms.items()}
    return [
        {
            "task": task,
            "completions": count,
            "chars": num_chars,
            "way": name,
            **timing.as_json(),
            "completions_per_s": count / timing.median_ms * 1e3,
            "speedup": timings["original"].median_ms / timing.median_ms,
        }
        for name, timing in timings.items()
    ]


def timed_s(way: Way, num_calls: int) -> float:
    began_s = time.perf_counter()
    for _ in range(num_calls):
        way()
    return time.perf_counter() - began_s


def ways_of(task: str, count: int) -> tuple[dict[str, Way], int]:
    """The ways that can run here, and the number of characters of the batch."""
    is_grounding = task == "grounding"
    texts, truths = (reward_answers.grounding if is_grounding else reward_answers.tracking)(count, seed=count)
    original, ours = (original_grounding, our_grounding) if is_grounding else (original_tracking, our_tracking)
    ways: dict[str, Way] = {
        "original": partial(original, texts, truths),
        "plain": partial(ours, PLAIN, texts, truths),
        "tasks": partial(ours, TASKS, texts, truths),
    }
    if not native.is_available():
        del ways["tasks"]
    elif native.has_cuda() and torch.cuda.is_available():
        ways["cuda"] = on_half(OnCuda(torch.device("cuda")), ways["tasks"])
    return ways, sum(map(len, texts))


def on_half(half: native.Half, way: Way) -> Way:
    """The way with overlaps and advantages computed by `half`."""

    def run_on_half() -> Scores:
        native.use(half, "benchmark")
        try:
            return way()
        finally:
            native.use(native.on_cpu, "C++")

    return run_on_half


def check_agreement(ways: dict[str, Way]) -> None:
    scores = {name: way() for name, way in ways.items()}
    for name, got in scores.items():
        tolerance = 0.0 if name in ("tasks", "cuda") else 1e-12
        for what, ours, wanted in zip(("format", "iou", "advantage"), got, scores["plain"], strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance, err_msg=f"{name}: {what}")


# The original's way, after its description: every sample on its own, patterns as strings, literals by Python's parser.

FORMAT = r"<think>.*?</think>\s*<answer>.*?</answer>"
PERIOD = r"(\d+\.?\d*) (to|and) (\d+\.?\d*)"


def original_grounding(texts: Sequence[str], truths: Sequence[list[Interval]]) -> Scores:
    formats, ious = [], []
    for text, [(start, end)] in zip(texts, truths, strict=True):
        formats.append(1.0 if re.fullmatch(FORMAT, text.strip(), re.DOTALL) else 0.0)
        blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        periods = re.findall(PERIOD, blocks[-1], re.IGNORECASE) if blocks else []
        iou = 0.0
        if periods:
            first, last = float(periods[-1][0]), float(periods[-1][2])
            hull = max(end, last) - min(start, first)
            if first <= last:
                iou = max(0.0, min(end, last) - max(start, first)) / hull if hull > 0 else 1.0
        ious.append(iou)
    return formats, ious, original_advantages(formats, ious)


def original_tracking(texts: Sequence[str], truths: Sequence[list[Box]]) -> Scores:
    formats, ious = [], []
    for text, truth in zip(texts, truths, strict=True):
        found = re.search(r"<answer>(.*?)</answer>", text.replace("\n", ""), re.DOTALL)
        try:
            rows = ast.literal_eval(found.group(1).strip()) if found else None
        except (ValueError, SyntaxError):
            rows = None
        rows = rows if isinstance(rows, list) else []
        is_track = len(rows) == len(truth) and all(len(row) == 4 for row in rows)
        formats.append(1.0 if is_track and re.fullmatch(FORMAT, text.strip(), re.DOTALL) else 0.0)
        ious.append(
            sum(original_box_iou(p, t) for p, t in zip(rows, truth, strict=True)) / len(truth) if is_track else 0.0
        )
    return formats, ious, original_advantages(formats, ious)


def original_box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def original_advantages(formats: list[float], ious: list[float]) -> list[float]:
    """One tensor operation after the other over [prompts, G]; a group of equal rewards keeps its rounding errors."""
    rewards = torch.tensor([formats, ious], dtype=torch.float64).sum(0).view(-1, GROUP_SIZE)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()


@dataclass(frozen=True)
class Functions:
    """Of ours, for the format and answers of `recipe: paper`."""

    have_format: Callable[..., Any]
    periods: Callable[..., Any]
    box_lists: Callable[..., Any]
    interval_iou: Callable[..., Any]
    track_iou: Callable[..., Any]
    advantages: Callable[..., Any]


PLAIN = Functions(
    lambda texts: answers_batch.have_format_plain(texts, "paper", True, ("answer",)),
    lambda texts: answers_batch.read_periods_plain(texts, "paper", "answer", "last"),
    lambda texts: answers_batch.read_box_lists_plain(texts, "paper", "answer", "first"),
    overlap.interval_iou_batch_plain,
    lambda tracks, truths: overlap.track_iou_batch_plain(tracks, truths, 0),
    reward_groups.group_advantages_plain,
)
TASKS = Functions(
    lambda texts: answers_batch.have_format(texts, "paper", True),
    lambda texts: answers_batch.read_periods(texts, "paper"),
    lambda texts: answers_batch.read_box_lists(texts, "paper", pick="first"),
    overlap.interval_iou_batch,
    lambda tracks, truths: overlap.track_iou_batch(tracks, truths, 0),
    reward_groups.group_advantages,
)


def our_grounding(by: Functions, texts: list[str], truths: list[list[Interval]]) -> Scores:
    formats = [float(ok) for ok in by.have_format(texts)]
    periods = [[period] if period and period[0] <= period[1] else [] for period in by.periods(texts)]
    return with_advantages(by, formats, by.interval_iou(periods, truths, "hull"))


def our_tracking(by: Functions, texts: list[str], truths: list[list[Box]]) -> Scores:
    formats, tracks = tracks_of(by.box_lists(texts), by.have_format(texts))
    return with_advantages(by, formats, by.track_iou(tracks, truths))


def with_advantages(by: Functions, formats: list[float], ious: list[float]) -> Scores:
    rewards = [format_part + iou for format_part, iou in zip(formats, ious, strict=True)]
    return formats, ious, by.advantages(rewards, list(range(0, len(ious) + 1, GROUP_SIZE)), "group")


def tracks_of(lists: Sequence[Any], has_tags: Sequence[bool]) -> tuple[list[float], list[Any]]:
    """Format reward, and the boxes of lists of the right length (all values in these answers are numbers)."""
    tracks = [rows if rows is not None and len(rows) == reward_answers.NUM_BOXES else [] for rows in lists]
    return [float(ok and bool(track)) for ok, track in zip(has_tags, tracks, strict=True)], tracks
