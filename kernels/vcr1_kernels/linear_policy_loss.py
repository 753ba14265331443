"""Fused language-model head and policy loss: hidden states -> loss, with gradients made on the way, in 3 GEMMs.

Other heads make the logits twice, in forward and again in backward (4 GEMMs). Here everything the loss needs besides
the log-probs is known beforehand, so a chunk of rows is finished in one visit:

    GEMM 1   logits = h W^T
    one row  log-prob, entropy, and E = exp(z - z_y) with -sum_{v != y} E_v at the target   (read logits, write E)
    [C]      loss and g = d(loss)/d(logprob), from any torch function, by autograd on vectors
    GEMM 2   dh = k (E W)            k = -g / (temperature * sum_v exp(z_v - z_y))
    GEMM 3   dW += E^T (k h)         float32

because d(loss)/d(logits) = k E for every policy loss. The row factor k goes into the small operands, so E is used as
the row kernel wrote it. The loss formula never enters a kernel and exists once (losses.py).

Shape letters: N tokens, C rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import Backend, runs_triton
from .head_chunks import (
    HeadGradients,
    auto_chunk_rows,
    check_head_inputs,
    effective_logits_dtype,
    matmul,
    row_chunks,
    scale_unless_one_,
    temperature_to_scale,
)
from .head_rows import exp_rows, gradient_rows
from .losses import LossFunction, TokenVectors
from .row_stats import stats_dtype


class Piece(NamedTuple):
    """Rows that go through the head together."""

    rows: slice | Tensor  # positions in [N]
    sequence_lens: tuple[int, ...] | None  # whole sequences of a sequence-level loss, else None
    needs_gradient: bool  # False: log-prob and entropy are wanted for the sums, but every coefficient is 0


def is_sequence_level(loss: LossFunction, tokens: TokenVectors) -> bool:
    """Whether chunks must hold whole sequences. A function of the user's counts as such when lengths are given."""
    return bool(getattr(loss, "is_sequence_level", tokens.sequence_lens is not None))


def plan_pieces(loss: LossFunction, tokens: TokenVectors, num_rows: int, chunk_rows: int) -> list[Piece]:
    """Chunks of the rows that have a coefficient, then chunks of those that have none (1 GEMM instead of 3).

    Which rows those are is read from `loss.zero_rows(tokens)`; on CUDA tensors that waits for the device once, on CPU
    tensors not at all.
    """
    lens = tokens.sequence_lens if is_sequence_level(loss, tokens) else None
    zero_rows: Callable[[TokenVectors], Tensor] | None = getattr(loss, "zero_rows", None)
    zero_N = zero_rows(tokens).cpu() if zero_rows is not None else torch.zeros(num_rows, dtype=torch.bool)
    if not bool(zero_N.any()):
        return _pieces(slice(0, num_rows), lens, num_rows, chunk_rows, True)
    if lens is not None:  # a sequence is dropped as a whole or not at all
        zero_S = torch.stack([part.all() for part in zero_N.split(lens)])
        zero_N = zero_S.repeat_interleave(torch.tensor(lens))
        active_lens = tuple(n for n, zero in zip(lens, zero_S.tolist(), strict=True) if not zero)
        idle_lens = tuple(n for n, zero in zip(lens, zero_S.tolist(), strict=True) if zero)
    else:
        active_lens = idle_lens = None
    active, idle = (~zero_N).nonzero().squeeze(1), zero_N.nonzero().squeeze(1)
    return [
        *_pieces(active, active_lens, active.numel(), chunk_rows, True),
        *_pieces(idle, idle_lens, idle.numel(), chunk_rows, False),
    ]


def _pieces(
    rows: slice | Tensor, lens: Sequence[int] | None, num_rows: int, chunk_rows: int, needs_gradient: bool
) -> list[Piece]:
    pieces = []
    sequence = 0
    for start, stop in row_chunks(num_rows, chunk_rows, lens):
        chunk_lens = None
        if lens is not None:
            first, length = sequence, 0
            while length < stop - start:
                length += lens[sequence]
                sequence += 1
            chunk_lens = tuple(lens[first:sequence])
        chunk = slice(start, stop) if isinstance(rows, slice) else rows[start:stop]
        pieces.append(Piece(chunk, chunk_lens, needs_gradient))
    return pieces


def _select(tokens: TokenVectors, piece: Piece, device: torch.device) -> TokenVectors:
    """The vectors of one piece, on the device of the head."""

    def rows_of(vector_N: Tensor) -> Tensor:
        rows = piece.rows if isinstance(piece.rows, slice) else piece.rows.to(vector_N.device)
        return vector_N[rows].to(device)

    return tokens.map(rows_of, piece.sequence_lens)


class Evaluated(NamedTuple):
    """A loss and its derivatives with respect to log-prob and entropy, [C] each; None where there is none."""

    loss: Tensor
    sums: dict[str, Tensor]
    logprob_grad: Tensor | None
    entropy_grad: Tensor | None


def evaluate_loss(
    loss: LossFunction, logprob_C: Tensor, entropy_C: Tensor, tokens: TokenVectors, needs_gradient: bool
) -> Evaluated:
    """Runs the loss under autograd on vectors alone.

    Raises: ValueError when the loss is not a scalar.
    """
    with torch.enable_grad():
        leaves = logprob_C.detach().requires_grad_(needs_gradient), entropy_C.detach().requires_grad_(needs_gradient)
        value, sums = loss(*leaves, tokens)
        if value.ndim != 0:
            raise ValueError(f"the loss function returned a loss of shape {tuple(value.shape)}, wanted a scalar")
        sums = {name: x.detach() for name, x in sums.items()}
        if not needs_gradient or not value.requires_grad:
            return Evaluated(value.detach(), sums, None, None)
        return Evaluated(value.detach(), sums, *torch.autograd.grad(value, leaves, allow_unused=True))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale_N: Tensor, loss: LossFunction,
        tokens: TokenVectors, pieces: list[Piece], logits_dtype: torch.dtype, triton: bool, wants_grad: bool,
        names: list[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        need_hidden, need_weight = (wants_grad and needs for needs in ctx.needs_input_grad[:2])
        grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
        total = torch.zeros((), dtype=stats_dtype(hidden_ND.dtype), device=hidden_ND.device)
        totals: dict[str, Tensor] = {}
        for piece in pieces:
            rows = piece.rows if isinstance(piece.rows, slice) else piece.rows.to(hidden_ND.device)
            needs_gradient = piece.needs_gradient and (need_hidden or need_weight)
            logits_CV = matmul(hidden_ND[rows], weight_VD.T, logits_dtype)
            exp_CV = hidden_ND.new_empty(logits_CV.shape) if needs_gradient else None
            stats = exp_rows(logits_CV, target_N[rows], scale_N[rows], exp_CV, True, triton)
            result = evaluate_loss(
                loss, stats.logprob, stats.entropy, _select(tokens, piece, hidden_ND.device), needs_gradient
            )
            total += result.loss
            for name, value in result.sums.items():
                totals[name] = totals[name] + value if name in totals else value
            if exp_CV is not None and result.entropy_grad is not None:
                logprob_grad_C = result.logprob_grad if result.logprob_grad is not None else torch.zeros_like(total)
                gradient_rows(
                    logits_CV, target_N[rows], scale_N[rows], stats, logprob_grad_C.expand_as(stats.logprob),
                    result.entropy_grad, exp_CV, triton,
                )  # fmt: skip
                grads.add_rows(rows, exp_CV)
            elif exp_CV is not None and result.logprob_grad is not None:
                grads.add_scaled_rows(rows, exp_CV, -result.logprob_grad * scale_N[rows] * stats.inv_total)
        ctx.grads = grads
        names.extend(totals)
        outputs = tuple(totals.values())
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_sums: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.grads is None:
            raise RuntimeError(
                "second backward through fused_linear_policy_loss: its gradients were made in forward and handed out; "
                "call the loss again instead of retain_graph=True"
            )
        grads, ctx.grads = ctx.grads, None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        for needed, grad in ((needs_hidden, grads.hidden_ND), (needs_weight, grads.weight_VD)):
            if needed:
                scale_unless_one_(grad, loss_grad)
        return (
            grads.hidden_ND if needs_hidden else None,
            grads.weight_VD if needs_weight else None,
            *(None,) * 9,
        )


def fused_linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    loss: LossFunction,
    tokens: TokenVectors,
    temperature: float | Tensor = 1.0,
    *,
    logits_dtype: torch.dtype = torch.float32,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of tokens straight from hidden states; gradients of hidden and weight in one visit, 3 GEMMs.

    Equal to `loss(*reference.linear_logprob(hidden, weight, target, temperature), tokens)`.

    Args:
        hidden_ND: [N, D] rows that predict the targets; weight_VD: [V, D]; both bfloat16, float32 or float64.
        target_N: [N] int32 or int64. A row with -100 has log-prob 0 and no gradient; give it weight 0.
        loss: `losses.PolicyLoss`, or any function (logprob, entropy, tokens) -> (scalar, sums). It must be additive:
            its value over all tokens is the sum over chunks. Where the loss of a token depends on its whole sequence,
            `tokens.sequence_lens` must be given: chunks then end where sequences end. Autograd gives the coefficients,
            so any differentiable torch code will do; a gradient with respect to entropy is honoured.
        tokens: advantages, weights and log-probs of the loss, [N] each, on any device. On the CPU they spare the device
            a wait: rows whose coefficient is 0 (`loss.zero_rows`) take 1 GEMM instead of 3.
        temperature, logits_dtype, chunk_rows, backend: as in `fused_linear_logprob`.

    Returns: (loss, sums): a float32 scalar (float64 for float64 inputs) to call backward on once, and the detached
    sums of the loss function added up over chunks.

    FLOPs: 3 times 2 N D V (2 with a frozen weight, 1 without gradients). Extra memory: one chunk's logits and E, the
    gradient of hidden, and a float32 gradient of the weight.

    Raises: ValueError or TypeError for inputs of wrong shape, dtype or device; RuntimeError on a second backward.
    """
    check_head_inputs(hidden_ND, weight_VD, target_N, logits_dtype)
    num_rows = hidden_ND.shape[0]
    if tokens.advantage_N.shape != (num_rows,):
        raise ValueError(f"tokens hold {tuple(tokens.advantage_N.shape)} advantages, wanted [{num_rows}] as in hidden")
    dtype = effective_logits_dtype(hidden_ND.dtype, logits_dtype)
    scale_N = temperature_to_scale(temperature, num_rows, hidden_ND)
    if chunk_rows is None:
        chunk_rows = auto_chunk_rows(hidden_ND.shape[1], weight_VD.shape[0], dtype.itemsize + hidden_ND.dtype.itemsize)
    pieces = plan_pieces(loss, tokens, num_rows, chunk_rows) or [Piece(slice(0, 0), tokens.sequence_lens, True)]
    names: list[str] = []
    with torch.autocast(hidden_ND.device.type, enabled=False):  # it would round float32 operands to bfloat16
        value, *sums = _LinearPolicyLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
            hidden_ND, weight_VD, target_N, scale_N, loss, tokens, pieces, dtype,
            runs_triton(backend, hidden_ND), torch.is_grad_enabled(), names,
        )  # fmt: skip
    return value, dict(zip(names, sums, strict=True))
