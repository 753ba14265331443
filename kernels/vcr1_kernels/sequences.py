"""Sums and means over the tokens of a sequence, for packed per-token vectors. Deterministic: no atomic additions.

Lengths are a tensor beside the values, so neither forward nor backward copies anything from the host.

Shape letters: N tokens of all sequences one after the other, S sequences.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .upload import upload


def lens_on(sequence_lens: tuple[int, ...], device: torch.device) -> Tensor:
    """[S] int64, the lengths as the functions here take them: one copy that the host does not wait for."""
    return upload(torch.tensor(sequence_lens, dtype=torch.long), device)


def sequence_sum(values_N: Tensor, lens_S: Tensor) -> Tensor:
    """[N]: at each token the sum over the tokens of its sequence. No gradient flows through it.

    Args: values_N: [N] floating; lens_S: [S] int64 on the same device, lengths >= 0 summing to N.
    """
    if not values_N.numel():
        return values_N
    # unsafe: the check of the lengths would wait for the device
    sums_S = torch.segment_reduce(values_N.detach(), "sum", lengths=lens_S, unsafe=True)
    return torch.repeat_interleave(sums_S, lens_S, output_size=values_N.numel())


def sequence_mean(values_N: Tensor, lens_S: Tensor) -> Tensor:
    """[N]: at each token the mean over the tokens of its sequence. Differentiable. Arguments as `sequence_sum`."""
    return cast(Tensor, _SequenceMean.apply(values_N, lens_S))


class _SequenceMean(torch.autograd.Function):
    """y_i = sum over j of [j in the sequence of i] x_j / length: a symmetric matrix, so its transpose is itself."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, lens_S: Tensor) -> Tensor:
        ctx.save_for_backward(lens_S)
        lens_N = torch.repeat_interleave(lens_S, lens_S, output_size=values_N.numel())
        return sequence_sum(values_N, lens_S) / lens_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sequence_mean(grads[0], *ctx.saved_tensors), None
