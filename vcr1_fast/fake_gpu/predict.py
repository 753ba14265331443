"""Counts -> seconds, by rates that are written here, or measured where there is a GPU, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcr1_fast.learner.model_size import ModelSize

LAUNCH_S = 2.5e-6  # the shortest a kernel takes, its launch included


@dataclass(frozen=True)
class Rates:
    """Of one GPU: what kernels reach in practice, not a data sheet's peaks. The defaults are assumed of an H100."""

    source: str = "assumed of an H100, not measured"
    gemm_flop_s: float = 680e12  # cuBLAS, bfloat16, large sizes
    attention_flop_s: Mapping[str, tuple[float, float]] = field(  # forward and backward, by version of flash-attn
        default_factory=lambda: {"fa2": (370e12, 300e12), "fa3": (640e12, 540e12), "fa4": (640e12, 540e12)}
    )
    memory_bytes_s: float = 2.7e12  # of 3.35e12
    link_bytes_s: float = 360e9  # NVLink, what all-gather and reduce-scatter reach of 450e9 each way
    network_bytes_s: float = 40e9  # per GPU, of a 400 Gb/s port

    def kernel_seconds(self, gemm_flop: int, moved_bytes: int) -> float:
        """Of one kernel that is no attention: the slower of its arithmetic and its traffic, and at least a launch."""
        return max(gemm_flop / self.gemm_flop_s, moved_bytes / self.memory_bytes_s, LAUNCH_S)

    def attention_seconds(self, flop: int, is_backward: bool, version: str = "fa2") -> float:
        """Of one attention kernel. `version`: of flash-attn; torch's own is 2."""
        return max(flop / self.attention_flop_s[version][is_backward], LAUNCH_S)

    def collective_seconds(self, num_bytes: float, ranks: Sequence[int], gpus_per_node: int = 8) -> float:
        """Of one ring, all-gather or reduce-scatter, of `num_bytes` in all: (N - 1) / N of them pass each GPU's link,
        all of them at the network's pace where one hop is between nodes. `ranks`: of the group."""
        is_within_node = len({rank // gpus_per_node for rank in ranks}) <= 1
        rate = self.link_bytes_s if is_within_node else self.network_bytes_s
        return num_bytes * (len(ranks) - 1) / max(len(ranks), 1) / rate

    def describe(self) -> str:
        """One line of numbers."""
        gemm, memory = (f"{rate / 1e12:.3g}" for rate in (self.gemm_flop_s, self.memory_bytes_s))
        pairs = {name: [f"{rate / 1e12:.3g}" for rate in pair] for name, pair in self.attention_flop_s.items()}
        attention = ", ".join(f"{name} {forward} forward and {back} back" for name, (forward, back) in pairs.items())
        links = f"{self.link_bytes_s / 1e9:.3g} GB/s between GPUs, {self.network_bytes_s / 1e9:.3g} between nodes"
        return f"GEMM {gemm} TFLOP/s, attention {attention}, memory {memory} TB/s, {links}"


H100_RATES = Rates()
# A data sheet tells an H200 from an H100 by its memory alone: 4.8e12 bytes/s, of which the same share is reached.
H200_RATES = replace(
    H100_RATES,
    source="assumed of an H200, not measured: an H100's, memory by the data sheets' 4.8 TB/s to 3.35",
    memory_bytes_s=H100_RATES.memory_bytes_s * 4.8 / 3.35,
)


def rollout_seconds(size: ModelSize, rates: Rates, prompt: int, answers: Sequence[int], groups: float = 1) -> float:
    """Of an engine that answers all groups of a GPU at once, bound by arithmetic and memory alone.

    Each prompt is filled once. Then every token of the longest answer reads the weights, and every answer that still
    goes on the keys and values of its prompt and of what it has so far: an engine that reads a prompt's once for all
    answers is faster. The tower counts its products alone; sampling, launches and the scheduler are left out.

    Args:
        prompt: its tokens, taken as video: 4 patches each.
        answers: tokens of each answer of a group.
    """
    layers, head = size.layers * size.layer_params, size.vocab * size.hidden
    pairs, own = prompt * (prompt + 1) / 2, sum(n * prompt + n * (n + 1) / 2 for n in answers)
    attention = 4 * size.layers * size.heads_width * groups
    fill_s = 2 * groups * prompt * (layers + 4 * size.tower_depth * size.tower_block_params) / rates.gemm_flop_s
    fill_s += rates.attention_seconds(round(attention * pairs), is_backward=False, version="fa3")  # what engines have
    read = 2 * max(answers) * (layers + head) + size.kv_bytes_per_token * groups * own
    flop = 2 * groups * sum(answers) * (layers + head) + attention * own
    return fill_s + max(read / rates.memory_bytes_s, flop / rates.gemm_flop_s)
