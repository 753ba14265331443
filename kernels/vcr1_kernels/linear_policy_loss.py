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

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
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
from .input_checks import check_loss
from .losses import LossFunction, PolicyLoss, TokenVectors
from .policy_visit import visit_all


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale_N: Tensor, loss: LossFunction,
        tokens: TokenVectors, logits_dtype: torch.dtype, chunk_rows: int | None, triton: bool, wants_grad: bool,
        suppressed_ids: Sequence[int], names: list[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        need_hidden, need_weight = (wants_grad and needs for needs in ctx.needs_input_grad[:2])
        head = Head(hidden_ND, weight_VD, target_N, scale_N, logits_dtype, triton, suppressed_ids)
        ctx.grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
        total, sums = visit_all(head, ctx.grads, loss, tokens, chunk_rows)
        names.extend(sums)
        outputs = tuple(sums.values())
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


VECTORS = tuple(field.name for field in fields(TokenVectors) if field.name != "sequence_lens")


@torch.library.custom_op(add_op_namespace_prefix("linear_policy_loss"), mutates_args=())
def _whole(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    scale_N: Tensor,
    vectors: list[Tensor],
    vector_names: str,
    sequence_lens: list[int] | None,
    settings: str,
    num_sums: int,
    suppressed_ids: list[int],
    logits_dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """([1 + num_sums] loss and sums, d hidden, d weight) for a compiled graph, which cannot hold a choice of rows by
    their values, nor objects: the loss comes as `PolicyLoss.settings`, its vectors with their names."""
    lens = None if sequence_lens is None else tuple(sequence_lens)
    given: dict[str, Any] = dict(zip(vector_names.split(), vectors, strict=True))
    head = Head(hidden_ND, weight_VD, target_N, scale_N, logits_dtype, triton, suppressed_ids)
    grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
    # below an operator autograd is off, and the loss needs it
    with (
        without_autocast(hidden_ND),
        torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
    ):
        loss = PolicyLoss.from_settings(settings)
        total, sums = visit_all(head, grads, loss, TokenVectors(**given, sequence_lens=lens), chunk_rows)
    return torch.stack([total, *(x.to(total.dtype) for x in sums.values())]), grads.hidden_ND, grads.weight_VD


@_whole.register_fake
def _(hidden_ND, weight_VD, target_N, scale_N, vectors, names, lens, settings, num_sums, *options):
    grads = HeadGradients(hidden_ND, weight_VD, *options[-2:])
    return scale_N.new_empty(1 + num_sums), grads.hidden_ND, grads.weight_VD


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        values, hidden_grad, weight_grad = _whole(hidden_ND, weight_VD, *arguments)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.needed = arguments[-2:]
        sums = values[1:].clone()
        ctx.mark_non_differentiable(sums)
        return values[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grads = zip(ctx.saved_tensors, ctx.needed, strict=True)
        return *(x * loss_grad if is_needed else None for x, is_needed in grads), *(None,) * 13


def _compiled(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    scale_N: Tensor,
    loss: PolicyLoss,
    tokens: TokenVectors,
    suppressed_ids: Sequence[int],
    options: tuple[torch.dtype, int | None, bool, bool],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as one operator of a compiled graph; options as below. The sums are of the loss's dtype, counts too."""
    *kernel, wants_grad = options
    given = [name for name in VECTORS if getattr(tokens, name) is not None]
    lens = None if tokens.sequence_lens is None else list(tokens.sequence_lens)
    names = loss.sum_names(tokens)
    value, sums = _Compiled.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_ND, weight_VD, target_N, scale_N, [getattr(tokens, name) for name in given], " ".join(given), lens,
        loss.settings, len(names), list(suppressed_ids), *kernel,
        wants_grad and hidden_ND.requires_grad, wants_grad and weight_VD.requires_grad,
    )  # fmt: skip
    return value, dict(zip(names, sums.unbind(), strict=True))


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
    suppressed_ids: Sequence[int] = (),
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
        temperature, logits_dtype, chunk_rows, backend, suppressed_ids: as in `fused_linear_logprob`.

    Returns: (loss, sums): a float32 scalar (float64 for float64 inputs) to call backward on once, and the detached
    sums of the loss function added up over chunks.

    torch.compile(fullgraph=True) and torch.export take it with a `losses.PolicyLoss` that was made outside; the sums
    are then of the loss's dtype, counts too. Another function breaks the graph here.

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
    options = (dtype, chunk_rows, runs_triton(backend, hidden_ND), torch.is_grad_enabled())
    if type(loss) is PolicyLoss and torch.compiler.is_compiling():  # a subclass has a __call__ of its own
        return _compiled(
            hidden_ND, weight_VD, target_N, scale_N, cast(PolicyLoss, loss), tokens, suppressed_ids, options
        )
    names: list[str] = []
    with without_autocast(hidden_ND):
        value, *sums = _LinearPolicyLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
            hidden_ND, weight_VD, target_N, scale_N, loss, tokens, *options, suppressed_ids, names
        )
    return value, dict(zip(names, sums, strict=True))
