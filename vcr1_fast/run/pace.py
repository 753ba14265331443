"""How fast the learner is: tokens a second on each GPU, and the share of its peak that the model's arithmetic takes.

    mfu = model FLOP of the updates / (GPUs x peak FLOP a second x seconds of the updates)

Model FLOP are those of forward and backward, without what checkpointing or flash attention recompute and without the
passes of a reference or for old log-probs (learner/row_cost.py); the peak is the data sheet's, dense bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from vcr1_fast.learner.sharding import World
from vcr1_fast.learner.step import UpdateReport

PEAK_FLOP_S = {  # by torch.cuda.get_device_name, the first that fits
    r"\bA100\b": 312e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\bG?H[12]00\b": 989e12,
    r"\bB200\b": 2250e12,
}


def peak_flop_s(name: str) -> float | None:
    """Of a GPU of that name; None for one that is not known."""
    return next((peak for pattern, peak in PEAK_FLOP_S.items() if re.search(pattern, name)), None)


def pace_metrics(reports: Sequence[UpdateReport], update_s: float, world: World) -> dict[str, float]:
    """Of the updates of a step, which took so many seconds. Reads what is known on the host; waits for nothing."""
    total = {name: sum(report.sums.get(name, 0.0) for report in reports) for name in ("tokens_executed", "model_flop")}
    gpu_s = update_s * world.world_size
    metrics = {"train/tokens_per_second_per_gpu": total["tokens_executed"] / gpu_s}
    peak = peak_flop_s(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return metrics if peak is None else metrics | {"train/mfu": total["model_flop"] / (peak * gpu_s)}
