"""Liger's kernels for RMSNorm and SwiGLU as registered operators: fake tensors, export, compilation and selective
recomputation see one operator in place of a launch.

Liger's own autograd functions are left aside; what launches a kernel is called, with the arguments of one release. They
are bound to its signatures at first use, so that another release is named and not guessed at.

Shape letters: T tokens or patches, D width, I width of an MLP.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OFFSET = 0.0  # added to the weight of a norm; other architectures than Llama's have 1
CASTING = "llama"  # statistics in float32; the normalised row is rounded before it meets the weight, as in transformers


_ARGUMENTS = {  # that the functions are called with
    "norm_forward": "X W eps offset casting_mode row_mode",
    "norm_backward": "dY X W RSTD offset casting_mode BLOCK_SIZE num_warps in_place row_mode needs_dw",
    "swiglu_forward": "a b",
    "swiglu_backward": "a b dc",
    "block": "n",
}


@dataclass(frozen=True)
class _Liger:
    norm_forward: Callable[..., Any]
    norm_backward: Callable[..., Any]
    swiglu_forward: Callable[..., Any]
    swiglu_backward: Callable[..., Any]
    block: Callable[[int], tuple[int, int]]  # columns -> (block size, warps)
    casting: int  # the number of CASTING


@functools.cache
def _liger() -> _Liger:
    """Raises ImportError where liger-kernel cannot be imported, RuntimeError where it has other functions."""
    modules = ("rms_norm", "swiglu", "utils")
    norm, swiglu, launch = (importlib.import_module(f"liger_kernel.ops.{name}") for name in modules)
    try:
        found = _Liger(
            norm.rms_norm_forward,
            norm.rms_norm_backward,
            swiglu.swiglu_forward,
            swiglu.swiglu_backward,
            launch.calculate_settings,
            norm._str_to_casting_mode[CASTING],
        )
        for name, arguments in _ARGUMENTS.items():
            inspect.signature(getattr(found, name)).bind(**dict.fromkeys(arguments.split()))
    except (AttributeError, TypeError, KeyError) as error:
        version = importlib.metadata.version("liger-kernel")
        raise RuntimeError(f"liger-kernel {version} has other functions than 0.8.5: {error}") from error
    return found


@torch.library.custom_op("vcr1_fast::rms_norm", mutates_args=())
def rms_norm_op(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, _hidden, rstd_T, *_launch = _liger().norm_forward(
        X=hidden.contiguous(), W=weight, eps=eps, offset=OFFSET, casting_mode=CASTING, row_mode=None
    )
    return out, rstd_T


@rms_norm_op.register_fake
def _(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd_T = hidden.new_empty(hidden.numel() // hidden.shape[-1], dtype=torch.float32)
    return hidden.new_empty(hidden.shape), rstd_T


@torch.library.custom_op("vcr1_fast::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad: Tensor, hidden: Tensor, weight: Tensor, rstd_T: Tensor, has_weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """The weight's gradient is empty where it is not asked for."""
    liger = _liger()
    block_size, num_warps = liger.block(hidden.shape[-1])
    grad_hidden, grad_weight = liger.norm_backward(
        dY=grad.contiguous(), X=hidden.contiguous().view(-1, hidden.shape[-1]), W=weight, RSTD=rstd_T,
        offset=OFFSET, casting_mode=liger.casting, BLOCK_SIZE=block_size, num_warps=num_warps,
        in_place=False, row_mode=None, needs_dw=has_weight_grad,
    )  # fmt: skip
    return grad_hidden, weight.new_empty(0) if grad_weight is None else grad_weight


@rms_norm_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, rstd_T: Tensor, has_weight_grad: bool) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape if has_weight_grad else 0)


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, _eps = inputs
    ctx.save_for_backward(hidden, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx: Any, grad: Tensor, _grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    has_weight_grad = ctx.needs_input_grad[1]
    grad_hidden, grad_weight = rms_norm_backward_op(grad, *ctx.saved_tensors, has_weight_grad)
    return grad_hidden, grad_weight if has_weight_grad else None, None


rms_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup)


@torch.library.custom_op("vcr1_fast::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _liger().swiglu_forward(a=gate.contiguous(), b=up.contiguous())[2]


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("vcr1_fast::swiglu_backward_", mutates_args=("gate", "up"))
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Leaves the gradients in the places of `gate` and `up`, which must be contiguous."""
    _liger().swiglu_backward(a=gate, b=up, dc=grad.contiguous())


@swiglu_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    return None


def _swiglu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = (x.detach() for x in ctx.saved_tensors)  # detached: it shares the counter of changes, see `swiglu`
    if not (gate.is_contiguous() and up.is_contiguous()):
        gate, up = gate.contiguous(), up.contiguous()
    swiglu_backward_op(grad, gate, up)
    return gate, up


swiglu_op.register_autograd(_swiglu_backward, setup_context=_swiglu_setup)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean of its squares + eps) x weight, over the last dimension, in the dtype of `hidden`.

    The mean is of float32, the normalised row is rounded to the dtype of `hidden` before the product. A float32 weight
    on a bfloat16 `hidden` (autocast on one GPU) gives bfloat16, where transformers gives float32 that the next product
    casts down: the same numbers reach it. Kept for backward: `hidden`, which the residual stream holds anyway, and a
    float32 a row, where transformers keeps the row in float32 and normalised besides.

    Bytes: 2 T D forward and 3 T D backward, where `hidden` and a gradient come in and a gradient goes out, x element
    size; Liger fills that gradient with zeros first, 1 T D more.

    Args:
        hidden: [..., D], D at most 65,536; weight: [D].
    """
    return rms_norm_op(hidden, weight, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up, [..., I], both of one dtype.

    Backward overwrites `gate` and `up` with their gradients, so that they take no memory of their own; both must be
    values that nothing else needs in backward, as results of matrix products are. A second backward through the same
    graph raises RuntimeError, because autograd sees the change.

    Bytes: 3 T I forward, 5 T I backward x element size.
    """
    return swiglu_op(gate, up)
