"""Full attention within each of many segments, in one flash attention call: the windows of a vision tower.

One registered operator forward and one backward, whichever flash attention runs in them (`flash_routes`), so that
autograd, selective recomputation and torch.compile see the same thing for all of them.

Shape letters: P tokens of all segments, H query heads, K key/value heads, C head dimension, B segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .flash_routes import Segments, VarlenOps, flash_ops


def varlen_attention(
    query_PHC: Tensor, key_PKC: Tensor, value_PKC: Tensor, ends: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """softmax(scale q k^T) v within each segment; every token of a segment sees all of it. CUDA, half precision.

    Args:
        query_PHC: [P, H, C]; key_PKC, value_PKC: [P, K, C], H a multiple of K.
        ends: [B + 1] int32 on their device: 0, and where each segment ends.
        lengths: [B] of integers on the host, the same: nothing reads `ends` back, and compiled code is not compiled
            anew for other lengths, as it would be for lengths in Python.

    Returns: [P, H, C]. FLOPs forward: 4 H C x sum of squared lengths; 2.5 times that backward.

    Raises: ValueError when `ends` has not one number more than `lengths`, or `lengths` do not add up to P; RuntimeError
    where no flash attention runs.
    """
    out_PHC, _lse_HP = ops.varlen_attention_forward(query_PHC, key_PKC, value_PKC, ends, lengths, scale)
    return out_PHC


def _route(query: Tensor) -> VarlenOps:
    found, reason = flash_ops(query.device)
    if found is None:
        raise RuntimeError(f"varlen_attention: no flash attention: {reason}")
    return found


def _segments(query: Tensor, ends: Tensor, lengths: Tensor) -> Segments:
    if ends.numel() != lengths.numel() + 1 or int(lengths.sum()) != len(query):
        raise ValueError(
            f"varlen_attention got {ends.numel()} ends and {lengths.numel()} lengths that add up to "
            f"{int(lengths.sum())}, wanted one end more, and {len(query)} in all"
        )
    longest = int(lengths.max())
    return Segments(ends, ends, longest, longest, causal=False)


@torch.library.custom_op(add_op_namespace_prefix("varlen_attention_forward"), mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(query):
        out, lse = _route(query).forward(query, key, value, _segments(query, ends, lengths), scale)
    return out.contiguous(), lse.contiguous()


@_forward_op.register_fake
def _(query: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)


@torch.library.custom_op(add_op_namespace_prefix("varlen_attention_backward"), mutates_args=())
def _backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, ends: Tensor, lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (query, key, value, out, lse)
    with torch.cuda.device_of(query):
        grads = _route(query).backward(grad.contiguous(), tensors, _segments(query, ends, lengths), scale)
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


@_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # the gradient of lse is dropped: it leaves this module only as a saved tensor
    grads = ops.varlen_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)
