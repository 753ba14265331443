"""How the shared-prefix attention kernels are launched: tiles, warps and constants, as data.

Below the kernels, which read their compile cases here, and the host side, which launches with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .backend import is_interpreted

MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class Launch:
    """Tile sizes and warps of one kernel: query rows and keys at a time, stages of the load pipeline."""

    rows: int
    keys: int
    num_warps: int
    stages: int


# By kernel and by padded head dimension. Chosen by what compiles for sm_90 without spills and within 227 KB of shared
# memory on Triton 3.6 to 3.9, with wgmma for every product (float32 has none); times are not measured.
SHIPPED: dict[str, dict[int, Launch]] = {
    "forward": {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 3)},
    "dq": {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 2)},
    "dkdv": {64: Launch(64, 128, 8, 2), 128: Launch(32, 128, 8, 2)},
}
SHIPPED_FLOAT32: dict[str, dict[int, Launch]] = {
    "forward": {64: Launch(32, 32, 4, 1), 128: Launch(16, 64, 4, 1)},
    "dq": {64: Launch(32, 32, 4, 1), 128: Launch(32, 32, 8, 1)},
    "dkdv": {64: Launch(32, 32, 4, 1), 128: Launch(16, 32, 8, 1)},  # of 64 rows Triton 3.9 makes 1,600 spills
}
ROW_LAUNCH = Launch(rows=64, keys=0, num_warps=8, stages=1)  # the delta and merge kernels, which have no keys


def padded_head_dim(head_dim: int) -> int:
    """The power of two in which a head is computed, 16 at least (the smallest product of `tl.dot`)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launch_of(kernel: str, head_dim: int, dtype: torch.dtype) -> Launch:
    """The shipped configuration; in the interpreter small tiles, so that small tests have several of each kind."""
    if is_interpreted():
        return Launch(16, 32, 4, 1) if kernel != "dkdv" else Launch(32, 16, 4, 1)
    table = SHIPPED_FLOAT32 if dtype == torch.float32 else SHIPPED
    return table[kernel][max(64, padded_head_dim(head_dim))]


def shipped_constants(kernel: str) -> Iterator[tuple[str, int, dict[str, int | bool], tuple[int, int]]]:
    """(dtype, head dimension, constants, (num_warps, num_stages)) of the shipped builds; 80 is the padded case.

    float16 differs from bfloat16 in the names of instructions only (same registers, counted), so it has one build here.
    """
    for dtype, head_dims in (("bf16", (64, 80, 128)), ("fp16", (128,)), ("fp32", (64, 80, 128))):
        table = SHIPPED_FLOAT32 if dtype == "fp32" else SHIPPED
        for head_dim in head_dims:
            launch = table[kernel][max(64, padded_head_dim(head_dim))]
            yield dtype, head_dim, _constants(head_dim, launch, dot_fp32=False), (launch.num_warps, launch.stages)


def _constants(head_dim: int, launch: Launch, dot_fp32: bool) -> dict[str, int | bool]:
    return {
        "HEAD_DIM": head_dim,
        "C": padded_head_dim(head_dim),
        "M": launch.rows,
        "N": launch.keys,
        "STAGES": launch.stages,
        "DOT_FP32": dot_fp32,
    }


def launch_options(head_dim: int, launch: Launch) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    constants = _constants(head_dim, launch, dot_fp32=is_interpreted())
    return {**constants, "num_warps": launch.num_warps, "num_stages": launch.stages}


def row_options(head_dim: int) -> dict[str, Any]:
    """Keyword arguments of a launch of the delta or the merge kernel."""
    padded = padded_head_dim(head_dim)
    return {"HEAD_DIM": head_dim, "C": padded, "M": ROW_LAUNCH.rows, "num_warps": ROW_LAUNCH.num_warps}
