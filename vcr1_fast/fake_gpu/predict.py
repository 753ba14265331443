"""Counts -> seconds, by rates that are written here, or measured where there is a GPU, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LAUNCH_S = 2.5e-6  # the shortest a kernel takes, its launch included


@dataclass(frozen=True)
class Rates:
    """Of one GPU: what kernels reach in practice, not a data sheet's peaks. The defaults are assumed of an H100."""

    source: str = "assumed of an H100, not measured"
    gemm_flop_s: float = 680e12  # cuBLAS, bfloat16, large sizes
    attention_forward_flop_s: float = 370e12  # FlashAttention 2
    attention_backward_flop_s: float = 300e12
    memory_bytes_s: float = 2.7e12  # of 3.35e12
    link_bytes_s: float = 360e9  # NVLink, what all-gather and reduce-scatter reach of 450e9 each way
    network_bytes_s: float = 40e9  # per GPU, of a 400 Gb/s port

    def kernel_seconds(self, gemm_flop: int, moved_bytes: int) -> float:
        """Of one kernel that is no attention: the slower of its arithmetic and its traffic, and at least a launch."""
        return max(gemm_flop / self.gemm_flop_s, moved_bytes / self.memory_bytes_s, LAUNCH_S)

    def attention_seconds(self, flop: int, is_backward: bool) -> float:
        """Of one attention kernel."""
        rate = self.attention_backward_flop_s if is_backward else self.attention_forward_flop_s
        return max(flop / rate, LAUNCH_S)

    def collective_seconds(self, num_bytes: float, ranks: Sequence[int], gpus_per_node: int = 8) -> float:
        """Of one ring, all-gather or reduce-scatter, of `num_bytes` in all: (N - 1) / N of them pass each GPU's link,
        all of them at the network's pace where one hop is between nodes. `ranks`: of the group."""
        is_within_node = len({rank // gpus_per_node for rank in ranks}) <= 1
        rate = self.link_bytes_s if is_within_node else self.network_bytes_s
        return num_bytes * (len(ranks) - 1) / max(len(ranks), 1) / rate

    def describe(self) -> str:
        """One line of numbers."""
        tera = (self.gemm_flop_s, self.attention_forward_flop_s, self.attention_backward_flop_s, self.memory_bytes_s)
        gemm, forward, backward, memory = (f"{rate / 1e12:.3g}" for rate in tera)
        links = f"{self.link_bytes_s / 1e9:.3g} GB/s between GPUs, {self.network_bytes_s / 1e9:.3g} between nodes"
        return f"GEMM {gemm} TFLOP/s, attention {forward} forward and {backward} back, memory {memory} TB/s, {links}"


H100_RATES = Rates()
