"""Counts -> seconds, by rates that are written here and nowhere else.

They are what kernels reach in practice, not a data sheet's peaks. Nothing here was measured on a GPU by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH_S = 2.5e-6  # the shortest a kernel takes, its launch included


@dataclass(frozen=True)
class Rates:
    """Of one GPU."""

    gemm_flop_s: float = 680e12  # cuBLAS, bfloat16, large sizes
    attention_forward_flop_s: float = 370e12  # FlashAttention 2
    attention_backward_flop_s: float = 300e12
    memory_bytes_s: float = 2.7e12  # of 3.35e12
    link_bytes_s: float = 360e9  # NVLink, what all-gather and reduce-scatter reach of 450e9 each way
    network_bytes_s: float = 40e9  # per GPU, of a 400 Gb/s port


H100_RATES = Rates()


def kernel_seconds(gemm_flop: int, moved_bytes: int, rates: Rates = H100_RATES) -> float:
    """Of one kernel that is no attention: the slower of its arithmetic and its traffic, and at least a launch."""
    return max(gemm_flop / rates.gemm_flop_s, moved_bytes / rates.memory_bytes_s, LAUNCH_S)


def attention_seconds(flop: int, is_backward: bool, rates: Rates = H100_RATES) -> float:
    """Of one attention kernel."""
    rate = rates.attention_backward_flop_s if is_backward else rates.attention_forward_flop_s
    return max(flop / rate, LAUNCH_S)


def collective_seconds(num_bytes: float, num_gpus: int, gpus_per_node: int = 8, rates: Rates = H100_RATES) -> float:
    """Of a ring all-gather or reduce-scatter of `num_bytes` in all: (N - 1) / N of them pass each GPU's link."""
    rate = rates.link_bytes_s if num_gpus <= gpus_per_node else rates.network_bytes_s
    return num_bytes * (num_gpus - 1) / num_gpus / rate
