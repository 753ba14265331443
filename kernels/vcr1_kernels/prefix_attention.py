"""Attention over rows of `[prompt | c_1 | ... | c_G]`: every completion sees the prompt and itself, nothing else.

The prompt's keys and values are used by G completions but exist once. Two dense problems and one merge:

    (A) causal attention inside each segment                          -> out_a, lse_a
    (B) all completion queries of a group against the prompt's keys   -> out_b, lse_b
    lse = logaddexp(lse_a, lse_b);  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

Backward runs the two problems again with the *merged* out and lse, because softmax probabilities relative to the merged
lse are the true ones: P = exp(S - lse), dS = P (dP - sum_c dout out). The prompt's dK and dV are the sums over both.
Letting autograd go through the merge instead needs the gradient of each lse, which flash attention backwards drop.

Three back ends do this, each an object with `forward` and `backward`: `torch` (prefix_attention_dense), `flash`
(prefix_attention_flash) and `triton` (prefix_attention_triton).

Shape letters: T packed tokens, H query heads, K key/value heads (H a multiple of K), C head dimension.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .backend import runs_triton, unavailable_reason
from .flash_routes import HALF_TYPES, Tensors, flash_ops
from .input_checks import FLOAT_DTYPES, check_tensors
from .prefix_attention_dense import DENSE, FLASH_CPU
from .prefix_attention_flash import FlashAttention
from .prefix_attention_launch import MAX_HEAD_DIM
from .prefix_attention_triton import TritonAttention
from .prefix_layout import PrefixGroup, PrefixLayout, check_layout, layout_to_tensor, read_layout

__all__ = [
    "AttentionBackend",
    "AttentionChoice",
    "PrefixGroup",
    "PrefixLayout",
    "attention_backend",
    "check_layout",
    "layout_to_tensor",
    "prefix_attention",
]

AttentionBackend = Literal["auto", "torch", "flash", "triton"]
_FLASH_MAX_HEAD_DIM = 256


class AttentionImplementation(Protocol):
    """A back end. Tensors as in `prefix_attention`, of the type the back end computes in; lse is [H, T]."""

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [T, H, C] contiguous, merged lse [H, T])"""
        ...

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV from (query, key, value, out, lse)."""
        ...


class AttentionChoice(NamedTuple):
    """The back end that `auto` takes and why; for the lines a run prints at its start."""

    name: Literal["torch", "flash", "triton"]
    reason: str


@functools.lru_cache(maxsize=64)
def _choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    if dtype == torch.float64:
        return AttentionChoice("torch", "float64 has no kernel")
    if device.type == "cpu":
        return AttentionChoice("flash", "torch's flash attention for CPUs")
    if device.type != "cuda":
        return AttentionChoice("torch", f"plain torch on {device.type}")
    flash_reason = f"flash attention has no {dtype} with {head_dim} dimensions a head"
    if dtype in HALF_TYPES and head_dim % 8 == 0 and head_dim <= _FLASH_MAX_HEAD_DIM:
        found, flash_reason = flash_ops(device)
        if found is not None:
            return AttentionChoice("flash", f"{found.name} ({flash_reason})")
    triton_reason = unavailable_reason()
    if triton_reason is None and head_dim > MAX_HEAD_DIM:
        triton_reason = f"the Triton kernels take heads of up to {MAX_HEAD_DIM} dimensions"
    if triton_reason is None:
        return AttentionChoice("triton", flash_reason)
    return AttentionChoice("torch", f"{flash_reason}; {triton_reason}")


def attention_backend(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> AttentionChoice:
    """Which back end `backend="auto"` runs. A function of its arguments and of what is installed, never of a trial.

    float64               torch: dense scores
    CPU                   flash: torch's blocked kernel for CPUs, in float32
    CUDA, half precision  flash: flash-attn 3, 4 or 2 where installed, else torch's own (flash_routes)
    CUDA, float32         triton: flash kernels have no float32, and dense scores of a long row do not fit (17 GB for
                          16 heads at 16k tokens); its products are full float32, not tf32, and use no tensor cores
    CUDA, anything else   triton where the head has at most 128 dimensions, else torch

    Args:
        dtype: of the values; queries and keys are cast to it.

    Raises: TypeError when dtype is no torch.dtype; RuntimeError for a device that torch does not know.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, wanted a torch.dtype such as torch.bfloat16")
    return _choice(torch.device(device), dtype, head_dim)


# torch.compile must not trace into the search for packages. This is what torch.compiler.assume_constant_result sets;
# the decorator itself would import torch._dynamo, which takes a second or two and imports Triton.
attention_backend._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# By name. `flash` is made for each device, because the GPU decides which package runs; one put here by hand goes first.
IMPLEMENTATIONS: dict[str, AttentionImplementation] = {"torch": DENSE, "triton": TritonAttention()}


def _implementation(name: str, device: torch.device) -> AttentionImplementation:
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    if device.type == "cpu":
        return FLASH_CPU
    found, reason = flash_ops(device)
    if found is None:
        raise RuntimeError(f"prefix_attention: no flash attention: {reason}; use backend='triton' or 'torch'")
    return FlashAttention(found)


@contextlib.contextmanager
def _as_given(query: Tensor) -> Iterator[None]:
    """Not under autocast, which would bring dense float32 products down to bfloat16; kernels on the query's GPU."""
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        yield


@torch.library.custom_op(
    add_op_namespace_prefix("prefix_attention_forward"),
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor layout, float scale, str backend) -> (Tensor, Tensor)",
)
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return _forward_fake(query, key, value, layout, scale, backend)
    with _as_given(query):
        implementation = _implementation(backend, query.device)
        return implementation.forward(query, key, value, read_layout(tuple(layout.tolist()), len(query)), scale)


@_forward_op.register_fake
def _forward_fake(query, key, value, layout, scale, backend):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("prefix_attention_backward"),
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor layout, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(grad, query, key, value, out, lse, layout, scale, backend):
    if query.shape[0] == 0:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    with _as_given(query):
        implementation = _implementation(backend, query.device)
        groups = read_layout(tuple(layout.tolist()), len(query))
        return implementation.backward(grad, (query, key, value, out, lse), groups, scale)


@_backward_op.register_fake
def _backward_fake(grad, query, key, value, out, lse, layout, scale, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, layout, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output, layout)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # the gradient of lse is dropped: it leaves this module only as a saved tensor
    grads = ops.prefix_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.backend)
    return (*grads, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _check_inputs(
    query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout | Tensor, scale: float
) -> None:
    check_tensors("prefix_attention", query=query_THC, key=key_TKC, value=value_TKC)
    dtypes = [x.dtype for x in (query_THC, key_TKC, value_TKC)]
    if not set(dtypes) <= set(FLOAT_DTYPES):
        raise TypeError(f"prefix_attention got {dtypes}, wanted bfloat16, float16, float32 or float64")
    _check_shapes(query_THC, key_TKC, value_TKC)
    _check_layout(layout, query_THC.shape[0])
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}, wanted a finite number, usually C ** -0.5")


def _check_layout(layout: PrefixLayout | Tensor, num_tokens: int) -> None:
    """Of a tensor no values: compiled code has none, and the op reads them anyway."""
    if isinstance(layout, Tensor):
        if layout.device.type != "cpu" or layout.dtype != torch.int64 or layout.ndim != 1:
            raise TypeError(f"layout is a tensor {layout.dtype} on {layout.device}, wanted that of layout_to_tensor")
        return
    if not isinstance(layout, tuple | list) or not all(isinstance(group, PrefixGroup) for group in layout):
        raise TypeError(f"layout is {layout!r}, wanted a tuple of PrefixGroup")
    check_layout(layout, num_tokens)


def _check_shapes(query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor) -> None:
    is_3d = query_THC.ndim == key_TKC.ndim == value_TKC.ndim == 3
    if not is_3d or key_TKC.shape != value_TKC.shape or key_TKC.shape[::2] != query_THC.shape[::2]:
        raise ValueError(
            f"prefix_attention got query {tuple(query_THC.shape)}, key {tuple(key_TKC.shape)}, "
            f"value {tuple(value_TKC.shape)}: wanted [T, H, C] and twice [T, K, C]"
        )
    num_heads = query_THC.shape[1]
    if 0 in key_TKC.shape[1:]:
        raise ValueError(f"prefix_attention got key {tuple(key_TKC.shape)}, wanted [T, K, C] with K >= 1 and C >= 1")
    if num_heads % key_TKC.shape[1]:
        raise ValueError(f"prefix_attention: {num_heads} query heads, {key_TKC.shape[1]} key heads: wanted a multiple")


def _choose(backend: AttentionBackend, query_THC: Tensor, value_TKC: Tensor) -> tuple[str, torch.dtype]:
    """The back end and the type it computes in."""
    head_dim, dtype = query_THC.shape[2], value_TKC.dtype
    if backend not in ("auto", "torch", "flash", "triton"):
        raise ValueError(f"backend is {backend!r}, wanted auto, torch, flash or triton")
    name = attention_backend(value_TKC.device, dtype, head_dim).name if backend == "auto" else backend
    runs_on_cpu = value_TKC.device.type == "cpu" and "flash" not in IMPLEMENTATIONS
    if name == "torch" or (name == "flash" and runs_on_cpu):
        return name, torch.promote_types(torch.promote_types(query_THC.dtype, dtype), torch.float32)
    if name == "flash":
        if not value_TKC.is_cuda and "flash" not in IMPLEMENTATIONS:  # one put there by hand runs where it can
            raise RuntimeError("prefix_attention: flash attention runs on CUDA and CPU tensors; use backend='torch'")
        if dtype not in HALF_TYPES or head_dim % 8 or head_dim > _FLASH_MAX_HEAD_DIM:
            raise ValueError(
                f"prefix_attention: flash attention got {dtype} and {head_dim} dimensions a head, wanted float16 or "
                f"bfloat16 and a multiple of 8 up to {_FLASH_MAX_HEAD_DIM}; use backend='triton' or 'torch'"
            )
    elif backend == "triton":
        runs_triton("triton", value_TKC)
        if dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"prefix_attention: the Triton kernels got {dtype} and {head_dim} dimensions a head, wanted float16, "
                f"bfloat16 or float32 and up to {MAX_HEAD_DIM}; use backend='torch'"
            )
    return name, dtype


def prefix_attention(
    query_THC: Tensor,
    key_TKC: Tensor,
    value_TKC: Tensor,
    layout: PrefixLayout | Tensor,
    scale: float,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Shared-prefix attention of one packed row, forward and backward, the prompt's keys and values read in place.

    Args:
        query_THC: [T, H, C]; key_TKC, value_TKC: [T, K, C], H a multiple of K; rotary embedding already applied.
        layout: the groups of the row, covering 0..T; inside of torch.compile `layout_to_tensor` of them.
        scale: factor of the scores, usually C ** -0.5.
        backend: `auto` is `attention_backend(device, value dtype, C)`.

    Returns: [T, H, C] of the type of the values. Equal to `reference.prefix_attention`, which is one masked softmax
    over [T, T]. Differentiable once. Rotary embedding under autocast hands over float32 queries and keys beside
    bfloat16 values: `torch` then computes in float32, while `flash` and `triton` take queries and keys in the type of
    the values, as a bfloat16 model without autocast would (one rounding, 2^-9 of each element; float32 operands would
    need three times the bytes and have no tensor cores).

    FLOPs forward, per group and query head: 4 C (P^2 / 2 + G R P + G R^2 / 2); over G separate rows it is G P^2 / 2.
    Bytes that must move in bfloat16: 4 T C (H + K) forward (q, out and k, v), twice that backward.

    Source: merging partial softmaxes by log-sum-exp, and dS from the final out and lse: FlashAttention 2 (Dao 2023,
    arXiv:2307.08691), algorithms 1 and 2.

    Raises: ValueError when the layout does not cover the row, shapes or devices do not fit, or the back end asked for
    has no such type or head size; TypeError for other types; RuntimeError when that back end cannot run on this device.
    """
    _check_inputs(query_THC, key_TKC, value_TKC, layout, scale)
    name, dtype = _choose(backend, query_THC, value_TKC)
    numbers = layout if isinstance(layout, Tensor) else layout_to_tensor(layout)
    out_THC, _lse_HT = ops.prefix_attention_forward(
        *(x.to(dtype) for x in (query_THC, key_TKC, value_TKC)), numbers, scale, name
    )
    return out_THC.to(value_TKC.dtype)
