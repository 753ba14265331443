"""Fused language-model head: hidden states -> log-prob of each target and entropy, without [N, V] logits in memory.

    z = h W^T / temperature;  logprob = z_y - logsumexp(z);  dz = g (onehot_y - p);  dh = dz W / T;  dW = dz^T h / T

The logits exist for one chunk of rows at a time. With 1 GEMM unit = 2 N D V FLOPs:

    keep="probs"   3 units: exp(z - z_y) is kept in the dtype of hidden, 2 N V bytes in bfloat16
    keep="none"    4 units: logits are made again in backward; nothing of size V is kept
    keep="auto"    probs where `can_keep` says that they fit, else none
    frozen head    2 units: forward keeps u = d(logprob)/d(hidden) in float32 [N, D], backward is g u

Shape letters: N tokens, C rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._ops import add_op_namespace_prefix
from .backend import Backend, runs_triton
from .head_chunks import (
    Head,
    HeadGradients,
    check_chunk_rows,
    check_head_inputs,
    effective_logits_dtype,
    matmul,
    temperature_to_scale,
    without_autocast,
)
from .row_stats import RowStats, stats_dtype

Keep = Literal["auto", "none", "probs"]
KEEP_FREE_FRAC = 0.25  # of a GPU's free memory that kept probabilities may take; gradients need the rest
KEEP_BYTES = 2 << 30  # the same where free memory is not looked at: 7,000 rows at V = 152k in bfloat16


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_forward"), mutates_args=())
def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    scale_N: Tensor,
    keep: str,
    logits_dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
    suppressed_ids: list[int],
) -> tuple[Tensor, Tensor]:
    """(stats [5, N], kept); kept is [N, V] for `probs`, [N, D] for `direction`, else empty."""
    head = Head(hidden_ND, weight_VD, target_N, scale_N, logits_dtype, triton, suppressed_ids)
    stats_5N = hidden_ND.new_empty(5, hidden_ND.shape[0], dtype=stats_dtype(hidden_ND.dtype))
    kept = _empty_kept(hidden_ND, weight_VD.shape[0], keep)
    for start, stop in head.chunks(chunk_rows, hidden_ND.shape[0]):
        _score(head, slice(start, stop), keep, stats_5N, kept)
    return stats_5N, kept


def _score(head: Head, rows: slice, keep: str, stats_5N: Tensor, kept: Tensor) -> None:
    """Fills these rows of both results of `_forward`.

    Its matrices [C, V] are gone when it returns: in variables of the loop they would live on beside the next ones.
    """
    exp_CV = kept[rows] if keep == "probs" else None
    if keep == "direction":
        exp_CV = head.hidden_ND.new_empty(rows.stop - rows.start, head.weight_VD.shape[0])
    stats = head.exp_rows(rows, head.logits(rows), exp_CV)
    torch.stack(tuple(stats), out=stats_5N[:, rows])
    if keep == "direction":
        assert exp_CV is not None
        unit_CD = matmul(exp_CV, head.weight_VD, kept.dtype)
        torch.mul(unit_CD, (-head.scale_N[rows] * stats.inv_total)[:, None], out=kept[rows])


def _empty_kept(hidden_ND: Tensor, vocab_size: int, keep: str) -> Tensor:
    num_rows, hidden_size = hidden_ND.shape
    if keep == "probs":
        return hidden_ND.new_empty(num_rows, vocab_size)
    if keep == "direction":
        return hidden_ND.new_empty(num_rows, hidden_size, dtype=stats_dtype(hidden_ND.dtype))
    return hidden_ND.new_empty(0)


@_forward.register_fake
def _(hidden_ND, weight_VD, target_N, scale_N, keep, logits_dtype, chunk_rows, triton, suppressed_ids):
    stats_5N = hidden_ND.new_empty(5, hidden_ND.shape[0], dtype=stats_dtype(hidden_ND.dtype))
    return stats_5N, _empty_kept(hidden_ND, weight_VD.shape[0], keep)


@torch.library.custom_op(add_op_namespace_prefix("linear_logprob_backward"), mutates_args=())
def _backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    scale_N: Tensor,
    stats_5N: Tensor,
    kept: Tensor,
    logprob_grad_N: Tensor,
    entropy_grad_N: Tensor | None,
    keep: str,
    need_hidden: bool,
    need_weight: bool,
    logits_dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
    suppressed_ids: list[int],
) -> tuple[Tensor, Tensor]:
    """(d hidden, d weight), empty where not needed."""
    head = Head(hidden_ND, weight_VD, target_N, scale_N, logits_dtype, triton, suppressed_ids)
    grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
    for start, stop in head.chunks(chunk_rows, hidden_ND.shape[0]):
        rows = slice(start, stop)
        stats = RowStats(*stats_5N[:, rows].unbind())
        if keep == "probs":
            grads.add_scaled_rows(rows, kept[rows], -logprob_grad_N[rows] * scale_N[rows] * stats.inv_total)
        else:
            entropy_grad_C = None if entropy_grad_N is None else entropy_grad_N[rows]
            # no name for the gradient of the logits: it must be gone when the next logits are made
            grads.add_rows(rows, _logits_gradient(head, rows, stats, logprob_grad_N[rows], entropy_grad_C))
    return grads.hidden_ND, grads.weight_VD


def _logits_gradient(
    head: Head, rows: slice, stats: RowStats, logprob_grad_C: Tensor, entropy_grad_C: Tensor | None
) -> Tensor:
    logits_CV = head.logits(rows)
    # the gradient overwrites the logits where both have the dtype of the GEMMs
    is_in_place = head.logits_dtype == head.hidden_ND.dtype
    grad_CV = logits_CV if is_in_place else head.hidden_ND.new_empty(logits_CV.shape)
    head.gradient_rows(rows, logits_CV, stats, logprob_grad_C, entropy_grad_C, grad_CV)
    return grad_CV


@_backward.register_fake
def _(hidden_ND, weight_VD, target_N, scale_N, stats_5N, kept, g_N, h_N, keep, need_hidden, need_weight, *options):
    grads = HeadGradients(hidden_ND, weight_VD, need_hidden, need_weight)
    return grads.hidden_ND, grads.weight_VD


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale_N: Tensor,
        keep: str, *options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        stats_5N, kept = _forward(hidden_ND, weight_VD, target_N, scale_N, keep, *options)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, scale_N, stats_5N, kept)
        ctx.keep, ctx.options = keep, options
        ctx.set_materialize_grads(False)
        return stats_5N[0].clone(), stats_5N[1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden_ND, weight_VD, target_N, scale_N, stats_5N, kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nothing = (None,) * (5 + len(ctx.options))
        if logprob_grad_N is None and entropy_grad_N is None:
            return nothing
        if logprob_grad_N is None:
            logprob_grad_N = torch.zeros_like(stats_5N[0])
        if ctx.keep == "direction":
            hidden_grad = torch.empty_like(hidden_ND)  # rounded as it is written: no product in float32 beside it
            return torch.mul(kept, logprob_grad_N[:, None], out=hidden_grad), *nothing[1:]
        with without_autocast(hidden_ND):
            hidden_grad, weight_grad = _backward(
                hidden_ND, weight_VD, target_N, scale_N, stats_5N, kept, logprob_grad_N, entropy_grad_N,
                ctx.keep, need_hidden, need_weight, *ctx.options,
            )  # fmt: skip
        return hidden_grad if need_hidden else None, weight_grad if need_weight else None, *nothing[2:]


def can_keep(hidden_ND: Tensor, vocab_size: int) -> bool:
    """Whether `keep="auto"` keeps probabilities: N V numbers in the dtype of hidden.

    On a GPU they may take KEEP_FREE_FRAC of what is free at the call. Elsewhere, and wherever the answer must not
    depend on the moment (torch.compile, fake tensors, a CUDA graph), KEEP_BYTES. Never where hooks watch what autograd
    saves: checkpointing would run the head again, perhaps with another answer, and offloading would copy all of it.
    """
    num_bytes = hidden_ND.shape[0] * vocab_size * hidden_ND.element_size()
    is_fixed = torch.compiler.is_compiling() or isinstance(hidden_ND, FakeTensor)
    if not is_fixed and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore
        return False
    if is_fixed or not hidden_ND.is_cuda or torch.cuda.is_current_stream_capturing():
        return num_bytes <= KEEP_BYTES
    device = hidden_ND.device
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free again, in torch's hands
    return num_bytes <= KEEP_FREE_FRAC * (torch.cuda.mem_get_info(device)[0] + cached)


def check_head_options(chunk_rows: int | None, backend: Backend, keep: Keep = "auto") -> None:
    """ValueError for an option that `fused_linear_logprob` does not have; a drop-in asks before the first step does."""
    if keep not in get_args(Keep):
        raise ValueError(f"keep is {keep!r}, wanted 'auto', 'none' or 'probs'")
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}, wanted auto, torch or triton")
    check_chunk_rows(chunk_rows)


def fused_linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    keep: Keep = "auto",
    entropy_grad: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
    suppressed_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax(hidden @ weight.T / temperature), and the entropy of that softmax.

    Equal to `reference.linear_logprob`, with memory for one chunk of logits. Differentiable in hidden and weight.

    Args:
        hidden_ND: [N, D] and weight_VD: [V, D], both bfloat16, float32 or float64. No bias.
        target_N: [N] int32 or int64 in 0..V-1; -100 leaves a row out: log-prob 0, entropy 0, no gradient. Its row
            still goes through the matrix products, so drop rows beforehand where there are many.
        temperature: > 0, or [N] with one per row.
        keep: `probs` keeps [N, V] numbers in the dtype of hidden (3 GEMM units); `none` makes the logits again in
            backward (4 units); `auto` keeps them without entropy_grad where they fit: `can_keep`, a quarter of a GPU's
            free memory. With a weight that needs no gradient [N, D] numbers are kept instead (2 units).
        entropy_grad: let gradients flow through the entropy (not with keep="probs"); otherwise it comes detached.
        logits_dtype: of the logits for bfloat16 inputs. float32 keeps log-probs within 1e-4; bfloat16 saves a third of
            the chunk's memory and puts 0.02 to 0.13 nats of noise on each log-prob.
        chunk_rows: rows whose logits exist at a time; None makes equal chunks (`head_chunks.auto_chunk_rows`).
        suppressed_ids: that are never drawn: their logits count as `SUPPRESSED_LOGIT`, so that their probability is 0.

    Returns: (logprob [N], entropy [N]) float32, or float64 for float64 inputs. Entropy in nats.

    FLOPs: 2, 3 or 4 times 2 N D V. Extra memory: a chunk's logits and their gradient, and the float32 gradient of the
    weight (`head_chunks.head_peak_bytes`). A row with a target >= V has log-prob NaN on CUDA.

    Raises: ValueError or TypeError for inputs of wrong shape, dtype or device, and for keep="probs" with entropy_grad;
    on the CPU IndexError for a target >= V.
    """
    check_head_inputs(hidden_ND, weight_VD, target_N, logits_dtype)
    check_head_options(chunk_rows, backend, keep)
    if keep == "probs" and entropy_grad:
        raise ValueError("keep='probs' has no gradient of the entropy: use keep='auto' with entropy_grad=True")
    dtype = effective_logits_dtype(hidden_ND.dtype, logits_dtype)
    scale_N = temperature_to_scale(temperature, hidden_ND.shape[0], hidden_ND)
    wants_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if not wants_grad:
        resolved_keep = "none"
    elif not weight_VD.requires_grad and not entropy_grad:
        resolved_keep = "direction"
    elif keep == "auto":
        resolved_keep = "probs" if not entropy_grad and can_keep(hidden_ND, weight_VD.shape[0]) else "none"
    else:
        resolved_keep = keep
    triton = runs_triton(backend, hidden_ND)
    with without_autocast(hidden_ND):
        logprob_N, entropy_N = _LinearLogprob.apply(  # pyright: ignore[reportGeneralTypeIssues]
            hidden_ND, weight_VD, target_N, scale_N, resolved_keep, dtype, chunk_rows, triton, list(suppressed_ids)
        )
    return logprob_N, entropy_N if entropy_grad else entropy_N.detach()
