"""One visit of each chunk of rows: its log-probs, the loss of it by autograd on vectors, its share of the gradients.

Called by linear_policy_loss.py, whose docstring has the algebra. Shape letters: N tokens, C rows of one chunk, D hidden
size, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .head_chunks import Head, HeadGradients
from .input_checks import checked_result
from .row_stats import stats_dtype
from .sequences import lens_on
from .token_vectors import LossFunction, TokenVectors
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


def visit_all(
    head: Head, grads: HeadGradients, loss: LossFunction, tokens: TokenVectors, chunk_rows: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its sums over all rows. Fills `grads`, unless neither of them is needed."""
    plan = plan_pieces(loss, tokens, head, chunk_rows)
    tokens, order_N = _in_order(tokens, plan, head.hidden_ND.device)
    total = torch.zeros((), dtype=stats_dtype(head.hidden_ND.dtype), device=head.hidden_ND.device)
    totals: dict[str, Tensor] = {}
    for start, stop, has_coefficient in plan.pieces:
        rows = slice(start, stop) if order_N is None else order_N[start:stop]
        result = _finish(head, grads, rows, loss, tokens.rows(start, stop), has_coefficient and grads.are_needed)
        total += result.loss
        for name, value in result.sums.items():
            totals[name] = totals[name] + value if name in totals else value
    return total, totals
