"""The fused head as other trainers call it: any leading dimensions, autocast, rows that are not scored left out.

Shape letters: T positions, D hidden size, V vocabulary, M positions with a target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear_logprob import fused_linear_logprob

IGNORED = -100


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the head multiplies in: the autocast dtype where autocast is on, else that of the hidden states."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def unsupported_dtype(hidden: Tensor) -> str | None:
    """Why the fused head cannot take these hidden states; None where it can."""
    return "float16, which our head does not take" if compute_dtype(hidden) == torch.float16 else None


def score_tokens(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float | Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`fused_linear_logprob` with `options` on [..., D] hidden states and [...] targets; both results are [...].

    The head runs in `compute_dtype`. Under autocast with float32 weights the weight's gradient is rounded to bfloat16
    once, as in every other linear layer.
    """
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logprob_T, entropy_T = fused_linear_logprob(
            hidden.reshape(-1, hidden.shape[-1]).to(dtype),
            weight_VD.to(dtype),
            target.reshape(-1),
            temperature,
            **options,
        )
    return logprob_T.view(target.shape), entropy_T.view(target.shape)


def score_wanted_tokens(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """As `score_tokens`; positions with target -100 get 0, 0 and take no part in the matrix products.

    One copy of a count from device to host, and one of the M rows of hidden states.
    """
    wanted_M = (target.reshape(-1) != IGNORED).nonzero().squeeze(1)
    if wanted_M.numel() == target.numel():
        return score_tokens(hidden, weight_VD, target, temperature, options)
    hidden_MD = hidden.reshape(-1, hidden.shape[-1]).index_select(0, wanted_M)
    scored = score_tokens(hidden_MD, weight_VD, target.reshape(-1)[wanted_M], temperature, options)
    spread = (values_M.new_zeros(target.numel()).index_copy(0, wanted_M, values_M) for values_M in scored)
    logprob_T, entropy_T = spread
    return logprob_T.view(target.shape), entropy_T.view(target.shape)
