"""The least time an op can take: bytes over the measured copy bandwidth, operations over the measured GEMM rate.

Both limits are measured on the machine at hand, in the same run; no number of a data sheet enters.

Shape letters: T tokens fed to the head, D hidden size, V vocabulary, C head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bench.harness import Outputs, Way, measure_copy_gb_s, measure_gemm_ms, time_interleaved

PATCH_VALUES = 3 * 2 * 14 * 14


@dataclass(frozen=True)
class Limits:
    """What this device reached on work that is nothing but bytes, or nothing but a matrix product."""

    copy_gb_s: float  # 1e9 bytes read plus written per second
    gemm_tflop_s: float  # of one large square product in `dtype`
    gemm_size: int
    dtype: str

    def bytes_ms(self, num_bytes: float) -> float:
        return num_bytes / self.copy_gb_s / 1e6

    def flop_ms(self, num_flop: float) -> float:
        return num_flop / self.gemm_tflop_s / 1e9

    def as_json(self) -> dict[str, float | str]:
        return asdict(self)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """A copy of 2 GiB (64 MiB on a CPU) and a square product of 8192 (512 on a CPU)."""
    is_cuda = device.type == "cuda"
    size = 8192 if is_cuda else 512
    gemm_ms = measure_gemm_ms(size, size, size, dtype, device)
    return Limits(
        copy_gb_s=measure_copy_gb_s(device, 2**31 if is_cuda else 2**26),
        gemm_tflop_s=2 * size**3 / gemm_ms / 1e9,
        gemm_size=size,
        dtype=str(dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class HeadGemms:
    """The three matrix products of a trainable head at one size, each measured alone on whole tensors, in ms."""

    logits: float  # hidden [T, D] @ weight [V, D]^T
    grad_hidden: float  # dlogits [T, V] @ weight [V, D]
    grad_weight: float  # dlogits [T, V]^T @ hidden [T, D]

    @property
    def train_ms(self) -> float:
        """Floor of forward and backward with a trained weight: each product once."""
        return self.logits + self.grad_hidden + self.grad_weight

    @property
    def frozen_ms(self) -> float:
        """Floor with a frozen weight: logits and the gradient of hidden."""
        return self.logits + self.grad_hidden


def measure_head_gemms(num_tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> HeadGemms:
    hidden_TD = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
    weight_VD = torch.randn(vocab, hidden, device=device, dtype=dtype)
    logits_TV = torch.empty(num_tokens, vocab, device=device, dtype=dtype)
    grad_hidden_TD, grad_weight_VD = torch.empty_like(hidden_TD), torch.empty_like(weight_VD)

    def logits() -> Outputs:
        return {"out": torch.mm(hidden_TD, weight_VD.t(), out=logits_TV)}

    def grad_hidden() -> Outputs:
        return {"out": torch.mm(logits_TV, weight_VD, out=grad_hidden_TD)}

    def grad_weight() -> Outputs:
        return {"out": torch.mm(logits_TV.t(), hidden_TD, out=grad_weight_VD)}

    ways = [Way("logits", logits), Way("grad_hidden", grad_hidden), Way("grad_weight", grad_weight)]
    for way in ways:
        way.run()
    timings = time_interleaved(ways, device, 0.2)
    return HeadGemms(*(timings[way.name].median_ms for way in ways))


def head_bytes(num_tokens: int, hidden: int, vocab: int, itemsize: int, *, is_trained: bool = True) -> int:
    """Least of a fused head: hidden states and weight read once, the gradient of each that has one written once."""
    return itemsize * hidden * (2 * num_tokens + (1 + is_trained) * vocab)


def attention_bytes(num_tokens: int, num_heads: int, num_key_heads: int, head_dim: int, itemsize: int) -> int:
    """Least of both ways: q, k, v read, the result written; then these and its gradient read, three written."""
    return itemsize * num_tokens * head_dim * (6 * num_heads + 6 * num_key_heads)


def logits_bytes(num_tokens: int, vocab: int, itemsize: int, passes: int) -> int:
    """Bytes of a logits-level op: 1 pass reads the logits (forward), 2 read and write them (forward and backward in
    place in a single sweep), 3 read them twice and write once (two sweeps)."""
    return passes * num_tokens * vocab * itemsize


def patchify_bytes(num_frames: int, height: int, width: int, itemsize: int) -> int:
    """Frames read once, patches written once; an odd last frame is read for both halves of its pair."""
    num_pairs = (num_frames + 1) // 2
    num_patches = num_pairs * (height // 14) * (width // 14)
    return num_frames * height * width * 3 + num_patches * PATCH_VALUES * itemsize


def causal_pairs(length: int) -> int:
    """Pairs (query, key <= query) of one causal segment."""
    return length * (length + 1) // 2


def shared_pairs(prompt_len: int, completion_lens: Sequence[int]) -> int:
    """(query, key) pairs of one packed row: the prompt causal, each completion on the prompt and causal on itself."""
    return causal_pairs(prompt_len) + sum(r * prompt_len + causal_pairs(r) for r in completion_lens)


def separate_pairs(prompt_len: int, completion_lens: Sequence[int]) -> int:
    """Pairs of the same group as separate causal rows."""
    return sum(causal_pairs(prompt_len + r) for r in completion_lens)


def attention_flop(num_pairs: int, num_heads: int, head_dim: int, *, backward: bool) -> int:
    """Two products per pair forward; a backward that recomputes the scores has five more."""
    return (2 + 5 * backward) * 2 * num_pairs * num_heads * head_dim
