"""`python -m bench scaling`: how time and memory of an update grow with frames, answers and their length.

Forward and backward of the tiny model on this machine, the original's way and ours (step_ways.py), their losses
compared first. Growth is the slope of log(value) against log(size) by least squares, with its standard error: 1 is in
proportion, 0 is no growth. Times say nothing of a GPU; how the work grows does.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.columns import heads_of, print_rows
from bench.harness import summarize
from bench.step_model import StepPoint, load_model
from bench.step_timing import drop_gradients, run_update
from bench.step_ways import WayName, WayOptions, losses
from vcr1_fast.fake_gpu.memory import Memory

WAYS: tuple[WayName, ...] = ("original", "kernels")
BASE = StepPoint("tiny", (32, 8, 8), 60, 60, 8)
AXES: dict[str, tuple[int, ...]] = {"frames": (16, 32, 64, 128), "G": (2, 4, 8, 16), "R": (30, 60, 120, 240)}
LOSS_ERROR = 1e-4  # relative, between two ways
COLUMNS = {
    "axis": ("axis", "what grows; the other two stay at 64 frames, G 8, R 60"),
    "at": ("at", "frames of the clip, G answers to the prompt, R tokens an answer"),
    "way": ("way", "original: G padded rows, as VideoChat-R1 does it; kernels: one packed row, as the trainer does it"),
    "median_ms": ("ms", "median of forward and backward"),
    "low_ms": ("low", "its first quartile"),
    "high_ms": ("high", "its third quartile"),
    "peak_mb": ("MB", "1e6 bytes of tensors alive at most, beside weights and inputs"),
}
FIT_COLUMNS = {
    "axis": ("axis", COLUMNS["axis"][1]),
    "way": ("way", COLUMNS["way"][1]),
    "time_exponent": ("time ~", "exponent of ms over the axis"),
    "time_error": ("+- time", "its standard error"),
    "memory_exponent": ("memory ~", "exponent of MB over the axis"),
    "memory_error": ("+- memory", "its standard error"),
}
COLUMN_HEADS = heads_of(COLUMNS, FIT_COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each way at each point")
    parser.add_argument("--quick", action="store_true", help="the three smallest sizes of each axis, one round")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points, then the fits. Raises RuntimeError when two ways give different losses."""
    hf = load_model("tiny", torch.float32, torch.device("cpu"))
    rounds, found, rows = 1 if arguments.quick else arguments.rounds, {}, []
    for axis, sizes in AXES.items():
        for size in sizes[: 3 if arguments.quick else None]:
            point = at(axis, size)
            if point not in found:
                found[point] = measure(hf, point, rounds)
            rows += [{"axis": axis, "at": size, "size": point.name, **row} for row in found[point]]
    fits = [fit_row(axis, way, rows) for axis in AXES for way in WAYS]
    print_rows(rows, COLUMNS, "forward and backward of the tiny model")
    print_rows(fits, FIT_COLUMNS, "growth: the exponent of a power of the axis")
    return {"rows": rows, "fits": fits}


def at(axis: str, size: int) -> StepPoint:
    if axis == "frames":
        return replace(BASE, grid=(size // 2, *BASE.grid[1:]))
    return replace(BASE, **{"G": {"num_completions": size}, "R": {"completion_len": size}}[axis])


def measure(hf: Any, point: StepPoint, rounds: int) -> list[dict[str, Any]]:
    """Loss and memory of each way once, which also warms up, then times in turns."""
    group = point.group(hf.config.video_token_id, hf.device, hf.dtype)
    options = WayOptions(point.num_completions, gradient_checkpointing=False)
    calls = {way: functools.partial(losses, way, hf, group, options) for way in WAYS}
    found_losses, peaks = [], {}
    for way in WAYS:
        with PeakBytes() as memory:
            found_losses.append(run_update(hf, None, calls[way]())[0])
        peaks[way] = memory.num_bytes
        drop_gradients(hf)
    if not math.isclose(*found_losses, rel_tol=LOSS_ERROR, abs_tol=1e-6):
        raise RuntimeError(f"{point.name}: losses are {found_losses} ({', '.join(WAYS)}), wanted the same")
    samples_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            samples_ms[way].append(run_update(hf, None, calls[way]())[1].total_ms)
            drop_gradients(hf)
    return [{"way": way, **summarize(samples_ms[way]).as_json(), "peak_mb": peaks[way] / 1e6} for way in WAYS]


class PeakBytes(TorchDispatchMode):
    """Most bytes of storages that operations made and that were alive at once; what they need inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = Memory()
        self._memory.enter("update")

    @property
    def num_bytes(self) -> int:
        return self._memory.peaks["update"].num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in inputs:  # a view is nothing new
                self._memory.see(x)
        return out


def fit_row(axis: str, way: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chosen = [row for row in rows if row["axis"] == axis and row["way"] == way]
    sizes = [row["at"] for row in chosen]
    time, time_error = slope(sizes, [row["median_ms"] for row in chosen])
    memory, memory_error = slope(sizes, [row["peak_mb"] for row in chosen])
    times = {"time_exponent": time, "time_error": time_error}
    return {"axis": axis, "way": way, **times, "memory_exponent": memory, "memory_error": memory_error}


def slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Of log(values) over log(sizes) by least squares, and its standard error sqrt(sum of squared residuals / (n - 2) /
    sum of (x - mean x)^2). Raises ValueError for fewer than three points."""
    if len(sizes) < 3:
        raise ValueError(f"slope got {len(sizes)} points, wanted at least 3: a line through two has no error")
    x, y = ([math.log(value) for value in side] for side in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    b = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True)) / spread
    left = sum((q - mean_y - b * (p - mean_x)) ** 2 for p, q in zip(x, y, strict=True))
    return b, math.sqrt(left / (len(x) - 2) / spread)
