"""Rewards of a step: completions per second of the original's way, of our plain Python and of the compiled module.

From the same texts and truths to the format and IoU rewards of `recipe: paper` and the advantages in groups of 8. The
rewards are compared before anything is timed: ours bit for bit, the original's to 1e-12.

original  what VideoChat-R1 (arXiv 2504.06958) does: regular expressions, ast.literal_eval, a loop over the samples
plain     the functions that define what is correct, `native.status()` aside
tasks     lists in, lists out, as the tasks call them: compiled readers and overlaps
arrays    one call reads, one call does overlap, reward and advantage; truths are arrays from the start
cuda      the same with the second call on the GPU, transfers there and back included
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import reward_answers
from bench.harness import summarize
from vcr1_fast import native
from vcr1_fast.tasks import answers_batch, overlap, reward_groups
from vcr1_fast.types import Box, Interval

COUNTS = (64, 512, 4096)
GROUP_SIZE = 8
MIN_SAMPLE_S = 0.01  # a timed sample repeats a call until it takes this long

Scores = tuple[list[float], list[float], list[float]]  # format, iou, advantage of each answer
Way = Callable[[], Scores]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="timed samples of each way; the median counts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every task and number of completions; `rows` holds one entry per task, count and way."""
    rows = [
        row for task in ("grounding", "tracking") for count in COUNTS for row in measure(task, count, arguments.repeats)
    ]
    table = Table(title=f"rewards of N completions (compiled module: {native.status()})")
    for column in ("task", "N", "way", "ms", "quartiles", "answers/s", "speed-up"):
        table.add_column(column, justify="left" if column in ("task", "way") else "right")
    for row in rows:
        table.add_row(
            row["task"], str(row["completions"]), row["way"], f"{row['median_ms']:.3f}",
            f"{row['low_ms']:.3f}-{row['high_ms']:.3f}", f"{row['completions_per_s']:,.0f}", f"{row['speedup']:.1f}",
        )  # fmt: skip
    Console().print(table)
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
            "median_ms": timing.median_ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
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
    texts, ways, truth, truth_offsets = grounding_ways(count) if task == "grounding" else tracking_ways(count)
    if native.is_available():
        arrays = (truth, truth_offsets, group_offsets(count))
        ways["arrays"] = lambda: arrays_way(task, texts, arrays)
        if native.has_cuda() and torch.cuda.is_available():
            on_gpu = tuple(torch.from_numpy(array).cuda() for array in arrays)
            ways["cuda"] = lambda: cuda_way(task, texts, on_gpu)
    else:
        del ways["tasks"]
    return ways, sum(map(len, texts))


def grounding_ways(count: int) -> tuple[list[str], dict[str, Way], np.ndarray, np.ndarray]:
    texts, truths = reward_answers.grounding(count, seed=count)
    ways: dict[str, Way] = {
        "original": lambda: original_grounding(texts, truths),
        "plain": lambda: plain_grounding(texts, truths),
        "tasks": lambda: tasks_grounding(texts, truths),
    }
    return texts, ways, *overlap.ragged(truths, width=2)


def tracking_ways(count: int) -> tuple[list[str], dict[str, Way], np.ndarray, np.ndarray]:
    texts, truths = reward_answers.tracking(count, seed=count)
    ways: dict[str, Way] = {
        "original": lambda: original_tracking(texts, truths),
        "plain": lambda: plain_tracking(texts, truths),
        "tasks": lambda: tasks_tracking(texts, truths),
    }
    return texts, ways, *overlap.ragged(truths, width=4)


def check_agreement(ways: dict[str, Way]) -> None:
    scores = {name: way() for name, way in ways.items()}
    for name, got in scores.items():
        tolerance = 0.0 if name in ("tasks", "arrays") else 1e-6 if name == "cuda" else 1e-12
        for what, ours, wanted in zip(("format", "iou", "advantage"), got, scores["plain"], strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance, err_msg=f"{name}: {what}")


def group_offsets(count: int) -> np.ndarray:
    return np.arange(0, count + 1, GROUP_SIZE)


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


def plain_advantages(formats: list[float], ious: list[float]) -> list[float]:
    rewards = reward_groups.weighted_rewards([formats, ious], [1.0, 1.0])
    return reward_groups.group_advantages_plain(rewards, group_offsets(len(ious)).tolist(), "group")


def plain_grounding(texts: list[str], truths: list[list[Interval]]) -> Scores:
    formats = [float(ok) for ok in answers_batch.have_format_plain(texts, "paper", True, ("answer",))]
    periods = answers_batch.read_periods_plain(texts, "paper", "answer", "last")
    ious = overlap.interval_iou_batch_plain([unreversed(period) for period in periods], truths, "hull")
    return formats, ious, plain_advantages(formats, ious)


def tasks_grounding(texts: list[str], truths: list[list[Interval]]) -> Scores:
    formats = [float(ok) for ok in answers_batch.have_format(texts, "paper", True)]
    periods = answers_batch.read_periods(texts, "paper")
    ious = overlap.interval_iou_batch([unreversed(period) for period in periods], truths, "hull")
    rewards = reward_groups.weighted_rewards([formats, ious], [1.0, 1.0])
    return formats, ious, reward_groups.group_advantages(rewards, group_offsets(len(ious)).tolist(), "group")


def unreversed(period: Interval | None) -> list[Interval]:
    return [period] if period and period[0] <= period[1] else []


def plain_tracking(texts: list[str], truths: list[list[Box]]) -> Scores:
    lists = answers_batch.read_box_lists_plain(texts, "paper", "answer", "first")
    has_tags = answers_batch.have_format_plain(texts, "paper", True, ("answer",))
    formats, tracks = tracks_of(lists, has_tags)
    ious = overlap.track_iou_batch_plain(tracks, truths, 0)
    return formats, ious, plain_advantages(formats, ious)


def tasks_tracking(texts: list[str], truths: list[list[Box]]) -> Scores:
    lists = answers_batch.read_box_lists(texts, "paper", pick="first")
    formats, tracks = tracks_of(lists, answers_batch.have_format(texts, "paper", True))
    ious = overlap.track_iou_batch(tracks, truths, 0)
    rewards = reward_groups.weighted_rewards([formats, ious], [1.0, 1.0])
    return formats, ious, reward_groups.group_advantages(rewards, group_offsets(len(ious)).tolist(), "group")


def tracks_of(lists: Sequence[Any], has_tags: Sequence[bool]) -> tuple[list[float], list[Any]]:
    """Format reward, and the boxes of lists of the right length (all values in these answers are numbers)."""
    tracks = [rows if rows is not None and len(rows) == reward_answers.NUM_BOXES else [] for rows in lists]
    return [float(ok and bool(track)) for ok, track in zip(has_tags, tracks, strict=True)], tracks


def read_arrays(task: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted rows [P, width], offsets [N + 1] and format rewards [1, N]."""
    from vcr1_fast import _native

    has_tags = np.array(_native.have_format(texts, ["think", "answer"], "paper"), np.float64)
    if task == "grounding":
        rows, offsets, _ = _native.period_rows(texts, "answer", "last", "paper")
        is_reversed = rows[:, 0] > rows[:, 1]
        if is_reversed.any():  # these answers lose their row
            offsets = offsets - np.concatenate([[0], np.cumsum(is_reversed)])[offsets]
            rows = rows[~is_reversed]
        return rows, offsets, has_tags[None]
    rows, offsets, lengths = _native.box_rows(texts, "answer", "first", "paper")
    return rows, offsets, (has_tags * (lengths == reward_answers.NUM_BOXES))[None]


def arrays_way(task: str, texts: list[str], arrays: tuple[np.ndarray, ...]) -> Scores:
    from vcr1_fast import _native

    truth, truth_offsets, groups = arrays
    rows, offsets, formats = read_arrays(task, texts)
    out = np.empty((3, len(texts)))
    batch = (rows, offsets, truth, truth_offsets)
    rest = (formats, np.ones(2), groups, "group", reward_groups.STD_FLOOR, out[0], out[1], out[2])
    if task == "grounding":
        _native.interval_advantages(*batch, "hull", *rest)
    else:
        _native.track_advantages(*batch, 0, "iou", *rest)
    return formats[0].tolist(), out[0].tolist(), out[2].tolist()


def cuda_way(task: str, texts: list[str], arrays: tuple[torch.Tensor, ...]) -> Scores:
    from vcr1_fast import _native

    truth, truth_offsets, groups = arrays
    read = read_arrays(task, texts)
    rows, offsets, formats = (torch.from_numpy(array).cuda(non_blocking=True) for array in read)
    weights = torch.ones(2, dtype=torch.float64, device="cuda")
    out = torch.empty(3, len(texts), dtype=torch.float64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    batch = (rows, offsets, truth, truth_offsets)
    rest = (formats, weights, groups, "group", reward_groups.STD_FLOOR, out[0], out[1], out[2], stream)
    if task == "grounding":
        _native.interval_advantages_cuda(*batch, "hull", *rest)
    else:
        _native.track_advantages_cuda(*batch, 0, "iou", *rest)
    ious, _, advantages = out.tolist()  # waits for the GPU
    return read[2][0].tolist(), ious, advantages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rewards", description=__doc__)
    add_arguments(parser)
    print(json.dumps({"benchmark": "rewards", **run(parser.parse_args())}))


if __name__ == "__main__":
    main()
