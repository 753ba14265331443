"""Sums and means over the tokens of a sequence, for packed per-token vectors. Deterministic: no atomic additions.

Shape letters: N tokens of all sequences one after the other, S sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def sequence_sum(values_N: Tensor, sequence_lens: tuple[int, ...]) -> Tensor:
    """[N]: at each token the sum over the tokens of its sequence. No gradient flows through it.

    Args: values_N: [N] floating; sequence_lens: S lengths >= 0 summing to N.
    """
    if not values_N.numel():
        return values_N
    lens_S = torch.tensor(sequence_lens, dtype=torch.long, device=values_N.device)
    sums_S = torch.segment_reduce(values_N.detach(), "sum", lengths=lens_S, unsafe=True)
    return torch.repeat_interleave(sums_S, lens_S, output_size=values_N.numel())


def sequence_mean(values_N: Tensor, sequence_lens: tuple[int, ...]) -> Tensor:
    """[N]: at each token the mean over the tokens of its sequence. Differentiable. Arguments as `sequence_sum`."""
    return cast(Tensor, _SequenceMean.apply(values_N, sequence_lens))


class _SequenceMean(torch.autograd.Function):
    """y_i = sum over j of [j in the sequence of i] x_j / length: a symmetric matrix, so its transpose is itself."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, sequence_lens: tuple[int, ...]) -> Tensor:
        ctx.sequence_lens = sequence_lens
        lens_S = torch.tensor(sequence_lens, dtype=torch.long, device=values_N.device)
        lens_N = torch.repeat_interleave(lens_S, lens_S, output_size=values_N.numel())
        return sequence_sum(values_N, sequence_lens) / lens_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sequence_mean(grads[0], ctx.sequence_lens), None
