"""Policy loss of logits that a trainer holds already: two passes over them, the gradient in place.

    forward    log-prob and entropy of each row, one read of the logits; the loss is torch code on vectors [N]
    backward   logits become d(loss)/d(logits), one read and one write

Shape letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import Backend, runs_triton
from .head_chunks import temperature_to_scale
from .head_rows import exp_rows, gradient_rows
from .input_checks import check_logits, check_loss, checked_result
from .losses import LossFunction, TokenVectors
from .row_stats import RowStats


class _LogprobOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_N: Tensor, scale_N: Tensor, inplace: bool, triton: bool
    ) -> tuple[Tensor, Tensor]:
        stats = exp_rows(logits_NV, target_N, scale_N, None, triton)
        ctx.save_for_backward(logits_NV, target_N, scale_N, *stats)
        ctx.inplace, ctx.triton, ctx.spent = inplace, triton, False
        ctx.set_materialize_grads(False)
        return stats.logprob.clone(), stats.entropy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.spent:
            raise RuntimeError(
                "second backward through policy_loss with inplace=True: the logits hold the gradient of the first; "
                "pass inplace=False to keep them"
            )
        logits_NV, target_N, scale_N, *stats = ctx.saved_tensors
        if logprob_grad_N is None and entropy_grad_N is None:
            return None, None, None, None, None
        if logprob_grad_N is None:
            logprob_grad_N = torch.zeros_like(stats[0])
        grad_NV = logits_NV.detach() if ctx.inplace else torch.empty_like(logits_NV)
        gradient_rows(
            logits_NV, target_N, scale_N, RowStats(*stats), logprob_grad_N, entropy_grad_N, grad_NV, ctx.triton
        )
        ctx.spent = ctx.inplace
        return grad_NV, None, None, None, None


def logprob_of_logits(
    logits_NV: Tensor,
    target_N: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    inplace: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy, differentiable, from logits [N, V] or [..., V].

    z = logits / temperature;  logprob = z_y - logsumexp(z);  dz_v = g (1[v = y] - p_v) - g_H p_v (log p_v + entropy)

    Args:
        logits_NV: [..., V] bfloat16, float16, float32 or float64 that `.view(-1, V)` accepts. To score a model's logits
            [B, L + 1, V] without a copy, pass them whole and -100 as the target of the last position.
        target_N: [...] int32 or int64; -100 leaves a row out (0, 0, gradient 0).
        temperature: > 0, or one per row.
        inplace: backward writes the gradient over the logits, which are lost: no second [N, V] buffer. Something that
            saved the logits for its own backward (another loss on them) then sees the gradient: pass False there.

    Returns: (logprob, entropy) of the shape of target, float32 (float64 for float64 logits).

    Bytes per logit of 2 bytes: 2 in forward, 4 in backward. One exp per element and pass; offsets are 64-bit, so more
    than 2^31 logits are fine; no length is compiled in.

    Raises: ValueError or TypeError for shapes, dtypes or devices that do not fit; on the CPU IndexError for a target
    >= V; RuntimeError on a second backward with inplace=True.
    """
    check_logits(logits_NV, target_N)
    vocab_size = logits_NV.shape[-1]
    try:
        rows_NV = logits_NV.view(-1, vocab_size)
    except RuntimeError as error:
        raise ValueError(
            f"logits of shape {tuple(logits_NV.shape)} and strides {logits_NV.stride()} are not rows of one matrix: "
            "pass the whole logits, with target -100 at the positions to leave out, instead of a slice"
        ) from error
    scale_N = temperature_to_scale(
        temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature, rows_NV.shape[0], rows_NV
    )
    logprob_N, entropy_N = _LogprobOfLogits.apply(  # pyright: ignore[reportGeneralTypeIssues]
        rows_NV, target_N.reshape(-1), scale_N, inplace, runs_triton(backend, rows_NV)
    )
    return logprob_N.view(target_N.shape), entropy_N.view(target_N.shape)


def policy_loss(
    logits_NV: Tensor,
    target_N: Tensor,
    loss: LossFunction,
    tokens: TokenVectors,
    temperature: float | Tensor = 1.0,
    *,
    inplace: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss from logits [N, V]: `loss(logprob, entropy, tokens)` with the log-probs of `logprob_of_logits`.

    Args:
        loss: `losses.PolicyLoss` or any function (logprob, entropy, tokens) -> (scalar, sums).
        tokens: [N] vectors in the order of the rows; rows with target -100 need weight 0.
        The others as in `logprob_of_logits`.

    Returns: (loss, sums).

    Raises: as `logprob_of_logits`, and TypeError or ValueError for a loss that is no such function, for vectors of
    another length than the logits have rows, and for what such a function must not return.
    """
    check_logits(logits_NV, target_N)
    check_loss(loss, tokens, target_N.numel())
    logprob_N, entropy_N = logprob_of_logits(logits_NV, target_N, temperature, inplace=inplace, backend=backend)
    return checked_result(loss(logprob_N.reshape(-1), entropy_N.reshape(-1), tokens))
