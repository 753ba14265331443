"""Rotary position embedding of queries and keys in one pass: M-RoPE of a decoder, and the 2-D one of a vision tower.

Shape letters: T tokens, H K query and key heads, C head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .backend import Backend, runs_triton
from .input_checks import FLOAT_DTYPES, check_tensors
from .prefix_attention_triton import unit_stride


def rotary(
    query_THC: Tensor,
    key_TKC: Tensor,
    cos: Tensor,
    sin: Tensor,
    sections: Sequence[int] = (),
    *,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates columns i and i + C/2 of every head by the angle of their token, as Hugging Face's rotary functions do.

        out_i = x_i cos_i - x_{i + C/2} sin_i,    out_{i + C/2} = x_{i + C/2} cos_{i + C/2} + x_i sin_{i + C/2}

    computed in float32 and rounded once. Differentiable in queries and keys; the gradient is the same rotation back.

    Args:
        query_THC, key_TKC: of one dtype; any strides with adjacent columns are read in place, so slices of a joint
            product of queries, keys and values are.
        cos, sin: [T, C] of any float dtype; with `sections` [3, T, C], one table for each axis (time, height, width).
        sections: columns of C/2 that turn with each of the three axes (`mrope_section`), sum C/2.
        interleaved: the axes take turns, column i has axis i % 3 while that axis has columns left and the first one
            then (Qwen3-VL); False: one axis after the other (Qwen2-VL, Qwen2.5-VL).
        backend: `auto` runs the Triton kernel for CUDA tensors and `reference.rotary` for CPU tensors.

    Returns contiguous [T, H, C] and [T, K, C].

    Bytes: queries and keys in and out once, 2 (H + K) T C x element size, forward and backward alike; beside them the
    tables, 2 T C. For 7,006 tokens of 7B in bfloat16 115 MB, 43 us at 2.7 TB/s (by arithmetic, not measured).

    Raises: ValueError and TypeError for other inputs; RuntimeError when `triton` is asked for and cannot run.
    """
    _check(query_THC, key_TKC, cos, sin, sections)
    triton = runs_triton(backend, query_THC)
    return ops.rotary(query_THC, key_TKC, cos, sin, list(sections), interleaved, False, triton)


def _check(query_THC: Tensor, key_TKC: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int]) -> None:
    check_tensors("rotary", query=query_THC, key=key_TKC, cos=cos, sin=sin)
    has_heads = query_THC.ndim == key_TKC.ndim == 3 and key_TKC.shape[::2] == query_THC.shape[::2]
    if not has_heads or query_THC.shape[-1] % 2:
        raise ValueError(
            f"rotary got queries {tuple(query_THC.shape)} and keys {tuple(key_TKC.shape)}, wanted [T, H, C] and "
            "[T, K, C] with an even C"
        )
    num_tokens, head_dim = query_THC.shape[::2]
    wanted = ((3,) if sections else ()) + (num_tokens, head_dim)
    if cos.shape != wanted or sin.shape != wanted:
        raise ValueError(f"rotary got tables {tuple(cos.shape)} and {tuple(sin.shape)}, wanted {wanted}")
    if sections and (len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != head_dim):
        raise ValueError(f"rotary got sections {tuple(sections)}, wanted three that sum to {head_dim // 2}")
    dtypes = [x.dtype for x in (query_THC, key_TKC, cos, sin)]
    if not set(dtypes) <= set(FLOAT_DTYPES) or dtypes[0] != dtypes[1]:
        raise TypeError(f"rotary got {dtypes}, wanted float dtypes, and queries and keys of one")


@torch.library.custom_op(add_op_namespace_prefix("rotary"), mutates_args=())
def _rotary(
    query_THC: Tensor,
    key_TKC: Tensor,
    cos: Tensor,
    sin: Tensor,
    sections: Sequence[int],
    interleaved: bool,
    inverse: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """`inverse`: by the negative angle, as the transpose of the rotation is."""
    if triton:
        return _launch(query_THC, key_TKC, cos, sin, sections, interleaved, inverse)
    if inverse:
        sin = -sin.roll(sin.shape[-1] // 2, dims=-1)
    rotated = reference.rotary(query_THC, key_TKC, cos, sin, sections, interleaved)
    return rotated[0].contiguous(), rotated[1].contiguous()


@_rotary.register_fake
def _(query_THC: Tensor, key_TKC: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    return query_THC.new_empty(query_THC.shape), key_TKC.new_empty(key_TKC.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _query, _key, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_query_THC: Tensor, grad_key_TKC: Tensor) -> tuple[Tensor | None, ...]:
    sections, interleaved, inverse, triton = ctx.options
    grads = ops.rotary(grad_query_THC, grad_key_TKC, *ctx.saved_tensors, sections, interleaved, not inverse, triton)
    return (*grads, None, None, None, None, None, None)


_rotary.register_autograd(_backward, setup_context=_setup)


def _launch(
    query_THC: Tensor,
    key_TKC: Tensor,
    cos: Tensor,
    sin: Tensor,
    sections: Sequence[int],
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    from .device.rotary import LAUNCH, rotary_kernel

    query_THC, key_TKC = unit_stride(query_THC), unit_stride(key_TKC)
    cos, sin = cos.contiguous(), sin.contiguous()
    num_tokens, num_queries, head_dim = query_THC.shape
    num_keys = key_TKC.shape[1]
    constants: dict[str, Any] = {"HALF": head_dim // 2, "COLUMNS": 1 << (head_dim // 2 - 1).bit_length()}
    constants |= dict(zip(("FIRST", "SECOND", "THIRD"), sections or (0, 0, 0), strict=True))
    constants |= {"INTERLEAVED": interleaved, "INVERSE": inverse}
    query_out_THC, key_out_TKC = query_THC.new_empty(query_THC.shape), key_TKC.new_empty(key_TKC.shape)
    groups = -(-num_queries // LAUNCH["HEADS"]) - (-num_keys // LAUNCH["HEADS"])
    if num_tokens:
        with torch.cuda.device_of(query_THC):  # Triton launches on the current device; nothing to do for a CPU tensor
            rotary_kernel[(-(-num_tokens // LAUNCH["TOKENS"]), groups)](
                query_THC, key_TKC, query_out_THC, key_out_TKC, cos, sin,
                query_THC.stride(0), query_THC.stride(1), key_TKC.stride(0), key_TKC.stride(1), num_tokens * head_dim,
                num_tokens, num_queries, num_keys, **constants, **LAUNCH,
            )  # fmt: skip
    return query_out_THC, key_out_TKC
