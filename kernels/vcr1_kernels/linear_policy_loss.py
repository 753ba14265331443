"""Fused language-model head and policy loss: hidden states -> loss, with gradients made on the way, in 3 GEMMs.

A head that gives log-probs to a loss outside makes the logits twice, in forward and again in backward (4 GEMMs: TRL
1.16, trl/kernels/chunked_logprob.py; prime-rl, trainer/models/layers/lm_head.py). Where the loss comes to the head, as
in XTuner (v1/loss/chunk_loss.py) and torchtitan (components/loss.py), a chunk of rows is finished in one visit. Here
that visit takes one pass of exponentials over float32 logits, and rows without a coefficient leave after GEMM 1:

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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import Backend, runs_triton
from .head_chunks import (
    Head,
    HeadGradients,
    check_chunk_rows,
    check_head_inputs,
    effective_logits_dtype,
    scale_unless_one_,
    temperature_to_scale,
    without_autocast,
)
from .input_checks import check_loss, checked_result
from .losses import LossFunction, TokenVectors
from .row_stats import stats_dtype
from .sequences import lens_on
from .upload import upload


class Piece(NamedTuple):
    """Rows start to stop - 1, in the order of the plan, that go through the head together."""

    start: int
    stop: int
    needs_gradient: bool  # False: log-prob and entropy are wanted for the sums, but every coefficient is 0


class Plan(NamedTuple):
    """Which rows go through the head when. Host values only."""

    order_N: Tensor | None  # [N] int64, positions of the rows in the order of the pieces; None: as they come
    sequence_lens: tuple[int, ...] | None  # in that order, where pieces hold whole sequences
    pieces: list[Piece]


def is_sequence_level(loss: LossFunction, tokens: TokenVectors) -> bool:
    """Whether chunks must hold whole sequences. A function of the user's counts as such when lengths are given."""
    return bool(getattr(loss, "is_sequence_level", tokens.sequence_lens is not None))


def plan_pieces(loss: LossFunction, tokens: TokenVectors, head: Head, chunk_rows: int | None) -> Plan:
    """Chunks of the rows that have a coefficient, then chunks of those that have none (1 GEMM instead of 3).

    Which rows those are is read from `tokens.is_zero_on_host`, else from `loss.zero_rows(tokens)`; on CUDA tensors that
    waits for the device once, on CPU tensors not at all.
    """
    num_rows = head.hidden_ND.shape[0]
    lens = tokens.sequence_lens if is_sequence_level(loss, tokens) else None
    zero_rows: Callable[[TokenVectors], Tensor] | None = getattr(loss, "zero_rows", None)
    zero_N = tokens.is_zero_on_host
    if zero_N is None:
        zero_N = zero_rows(tokens).cpu() if zero_rows is not None else torch.zeros(num_rows, dtype=torch.bool)
    if not bool(zero_N.any()):
        chunks = head.chunks(chunk_rows, num_rows, lens) or [(0, 0)]
        return Plan(None, lens, [Piece(start, stop, True) for start, stop in chunks])
    live_lens = idle_lens = None
    if lens is not None:  # a sequence is dropped as a whole or not at all
        is_zero_S = [bool(part.all()) for part in zero_N.split(lens)]
        zero_N = torch.tensor(is_zero_S).repeat_interleave(torch.tensor(lens))
        live_lens = tuple(n for n, is_zero in zip(lens, is_zero_S, strict=True) if not is_zero)
        idle_lens = tuple(n for n, is_zero in zip(lens, is_zero_S, strict=True) if is_zero)
        lens = (*live_lens, *idle_lens)
    num_idle = int(zero_N.sum())
    num_live = num_rows - num_idle
    pieces = [Piece(start, stop, True) for start, stop in head.chunks(chunk_rows, num_live, live_lens)]
    idle = head.chunks(chunk_rows, num_idle, idle_lens)
    pieces += [Piece(num_live + start, num_live + stop, False) for start, stop in idle]
    is_in_order = bool(zero_N[num_live:].all())  # the idle rows come last anyway
    return Plan(None if is_in_order else zero_N.to(torch.uint8).argsort(stable=True), lens, pieces)


def _in_order(tokens: TokenVectors, plan: Plan, device: torch.device) -> tuple[TokenVectors, Tensor | None]:
    """The vectors in the order of the plan, and that order, on `device`: one copy for each, however many pieces."""
    order_N = None if plan.order_N is None else upload(plan.order_N, device)

    def in_order(vector_N: Tensor) -> Tensor:
        vector_N = upload(vector_N, device)
        return vector_N if order_N is None else vector_N[order_N]

    lens = plan.sequence_lens
    return tokens.map(in_order, lens, None if lens is None else lens_on(lens, device)), order_N


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

    Raises: TypeError or ValueError when the loss function returns something else than a scalar and a dict of sums.
    """
    with torch.enable_grad():
        leaves = logprob_C.detach().requires_grad_(needs_gradient), entropy_C.detach().requires_grad_(needs_gradient)
        value, sums = checked_result(loss(*leaves, tokens))
        sums = {name: x.detach() for name, x in sums.items()}
        if not needs_gradient or not value.requires_grad:
            return Evaluated(value.detach(), sums, None, None)
        return Evaluated(value.detach(), sums, *torch.autograd.grad(value, leaves, allow_unused=True))


def _score(
    head: Head, rows: slice | Tensor, loss: LossFunction, tokens: TokenVectors, needs_gradient: bool
) -> tuple[Evaluated, Tensor | None, Tensor | None]:
    """The loss of a piece, and d(loss)/d(logits) as a matrix [C, V] and the factors [C] of its rows (None: 1)."""
    logits_CV = head.logits(rows)
    exp_CV = head.hidden_ND.new_empty(logits_CV.shape) if needs_gradient else None
    stats = head.exp_rows(rows, logits_CV, exp_CV)
    result = evaluate_loss(loss, stats.logprob, stats.entropy, tokens, needs_gradient)
    if exp_CV is None or (result.logprob_grad is None and result.entropy_grad is None):
        return result, None, None
    logprob_grad_C = torch.zeros_like(stats.logprob) if result.logprob_grad is None else result.logprob_grad
    if result.entropy_grad is None:
        return result, exp_CV, -logprob_grad_C * head.scale_N[rows] * stats.inv_total
    head.gradient_rows(rows, logits_CV, stats, logprob_grad_C, result.entropy_grad, exp_CV)
    return result, exp_CV, None


def _finish(
    head: Head,
    grads: HeadGradients,
    rows: slice | Tensor,
    loss: LossFunction,
    tokens: TokenVectors,
    needs_gradient: bool,
) -> Evaluated:
    """All there is to do for a piece: its loss, and its share of the gradients.

    The logits are gone when the gradients' products begin, and the matrix [C, V] when the next piece does: in variables
    of the loop over pieces both would live on beside the next logits.
    """
    result, matrix_CV, factor_C = _score(head, rows, loss, tokens, needs_gradient)
    if matrix_CV is not None and factor_C is None:
        grads.add_rows(rows, matrix_CV)
    elif matrix_CV is not None and factor_C is not None:
        grads.add_scaled_rows(rows, matrix_CV, factor_C)
    return result


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale_N: Tensor, loss: LossFunction,
        tokens: TokenVectors, order_N: Tensor | None, pieces: list[Piece], logits_dtype: torch.dtype, triton: bool,
        wants_grad: bool, names: list[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        need_hidden, need_weight = (wants_grad and needs for needs in ctx.needs_input_grad[:2])
        head = Head(hidden_ND, weight_VD, target_N, scale_N, logits_dtype, triton)
        grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
        total = torch.zeros((), dtype=stats_dtype(hidden_ND.dtype), device=hidden_ND.device)
        totals: dict[str, Tensor] = {}
        for start, stop, has_coefficient in pieces:
            rows = slice(start, stop) if order_N is None else order_N[start:stop]
            needs_gradient = has_coefficient and (need_hidden or need_weight)
            result = _finish(head, grads, rows, loss, tokens.rows(start, stop), needs_gradient)
            total += result.loss
            for name, value in result.sums.items():
                totals[name] = totals[name] + value if name in totals else value
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
            *(None,) * 10,
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
        tokens: advantages, weights and log-probs of the loss, [N] each, on any device. Rows whose coefficient is 0
            (`loss.zero_rows`) take 1 GEMM instead of 3. Which ones is decided on the host: vectors on the CPU are read
            there and then sent once each, with no wait; vectors on the device are waited for once, unless
            `is_zero_on_host` says it. Vectors in pinned memory must not be overwritten before the device has read them.
        temperature, logits_dtype, chunk_rows, backend: as in `fused_linear_logprob`.

    Returns: (loss, sums): a float32 scalar (float64 for float64 inputs) to call backward on once, and the detached
    sums of the loss function added up over chunks.

    FLOPs: 3 times 2 N D V (2 with a frozen weight, 1 without gradients). Extra memory: one chunk's logits and E, the
    gradient of hidden, and a float32 gradient of the weight (`head_chunks.head_peak_bytes`).

    Raises: ValueError or TypeError for inputs of wrong shape, dtype or device, and for a loss that is no such function
    or returns something else; on the CPU IndexError for a target >= V; RuntimeError on a second backward.
    """
    check_head_inputs(hidden_ND, weight_VD, target_N, logits_dtype)
    num_rows = hidden_ND.shape[0]
    check_loss(loss, tokens, num_rows)
    dtype = effective_logits_dtype(hidden_ND.dtype, logits_dtype)
    scale_N = temperature_to_scale(temperature, num_rows, hidden_ND)
    check_chunk_rows(chunk_rows)
    head = Head(hidden_ND, weight_VD, target_N, scale_N, dtype, runs_triton(backend, hidden_ND))
    plan = plan_pieces(loss, tokens, head, chunk_rows)
    ordered, order_N = _in_order(tokens, plan, hidden_ND.device)
    names: list[str] = []
    with without_autocast(hidden_ND):
        value, *sums = _LinearPolicyLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
            hidden_ND, weight_VD, target_N, scale_N, loss, ordered, order_N, plan.pieces, dtype,
            runs_triton(backend, hidden_ND), torch.is_grad_enabled(), names,
        )  # fmt: skip
    return value, dict(zip(names, sums, strict=True))
