"""Liger's norms and SwiGLU as operators: transformers' values and gradients, and what autograd sees of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from tests.learner.interpreted_liger import interpret_floats
from vcr1_fast.learner import liger_ops
from vcr1_fast.learner.liger_ops import rms_norm, swiglu

ROWS, WIDTH = 5, 48  # a width that is no power of two
STEP = 2**-10  # of a float16 value to the next. In bfloat16 the interpreter has no products: it multiplies the bits


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpret_floats(monkeypatch)
    yield
    liger_ops._liger.cache_clear()


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of a random combination of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, made(*out.shape, seed=9).to(out.dtype))]


def stock_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    norm = Qwen2_5_VLRMSNorm(WIDTH, eps=1e-5)
    del norm.weight
    norm.weight = weight
    return norm(hidden)


def our_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(hidden, weight, 1e-5)


def stock_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def test_norm_in_float32():
    inputs = made(2, ROWS, WIDTH), 1 + 0.2 * made(WIDTH, seed=1)
    for got, value in zip(both(our_norm, *inputs), both(stock_norm, *inputs), strict=True):
        torch.testing.assert_close(got, value, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=["sharded", "autocast"])
def test_norm_in_half_precision(weight_dtype: torch.dtype):
    """A float32 weight gives float16 here, float32 in transformers, which autocast casts down at the next product."""
    hidden, weight = made(ROWS, WIDTH).half(), (1 + 0.2 * made(WIDTH, seed=1)).to(weight_dtype)
    got, value = both(our_norm, hidden, weight), both(stock_norm, hidden, weight)
    assert [x.dtype for x in got] == [torch.float16, torch.float16, weight_dtype]
    for ours, theirs in zip(got, value, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 2 * STEP * theirs.float().abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2 * STEP)])
def test_swiglu(dtype: torch.dtype, bound: float):
    inputs = made(2, ROWS, WIDTH).to(dtype), made(2, ROWS, WIDTH, seed=1).to(dtype)
    for got, value in zip(both(swiglu, *inputs), both(stock_swiglu, *inputs), strict=True):
        assert got.dtype == dtype
        assert (got.float() - value.float()).abs().max() <= bound * value.float().abs().max()


def test_inputs_of_any_strides():
    """As of a product that is cut into gate and up, and a gradient that is broadcast."""
    joint = made(ROWS, 2 * WIDTH)

    def through(function: Any) -> list[Tensor]:
        leaf = joint.clone().requires_grad_()
        out = function(*leaf.chunk(2, dim=-1))
        return [out.detach(), *torch.autograd.grad(out.sum(), [leaf])]

    for got, value in zip(through(swiglu), through(stock_swiglu), strict=True):
        torch.testing.assert_close(got, value)


def test_a_frozen_weight_takes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    norm = importlib.import_module("liger_kernel.ops.rms_norm")
    asked = []

    @functools.wraps(norm.rms_norm_backward)
    def seen(**arguments: Any) -> Any:
        asked.append((arguments["needs_dw"], arguments["in_place"]))
        return seen.__wrapped__(**arguments)

    monkeypatch.setattr(norm, "rms_norm_backward", seen)
    liger_ops._liger.cache_clear()
    hidden = made(ROWS, WIDTH).requires_grad_()
    our_norm(hidden, torch.ones(WIDTH)).sum().backward()
    assert asked == [(False, False)] and hidden.grad is not None


def test_a_second_backward_is_refused_because_gate_and_up_are_gradients_by_then():
    inputs = [(made(ROWS, WIDTH, seed=seed) @ torch.eye(WIDTH)).requires_grad_() for seed in range(2)]
    total = swiglu(*inputs).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("mode", ["full", "selective", "compiled"])
def test_an_mlp_has_the_same_gradients_when_it_is_recomputed_or_compiled(mode: str):
    """Selective: the products are kept, so that backward overwrites what the recomputation was handed."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    from vcr1_fast.learner.recompute import _policy

    first, second = (made(WIDTH, WIDTH, seed=seed).requires_grad_() for seed in (1, 2))
    norm_weight = made(WIDTH, seed=3).requires_grad_()

    def block(hidden: Tensor) -> Tensor:
        normed = rms_norm(hidden, norm_weight, 1e-5)
        return swiglu(normed @ first, normed @ second) @ first

    def gradients(function: Any) -> list[Tensor]:
        leaves = [made(ROWS, WIDTH).requires_grad_(), first, second, norm_weight]
        return list(torch.autograd.grad(function(leaves[0]).square().sum(), leaves))

    ways = {
        "full": lambda x: checkpoint(block, x, use_reentrant=False),
        "selective": lambda x: checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(_policy)
        ),
        "compiled": torch.compile(block, fullgraph=True, backend="aot_eager"),
    }
    for got, value in zip(gradients(ways[mode]), gradients(block), strict=True):
        assert torch.equal(got, value)


def test_operators_are_registered_well():
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    hidden, weight = made(ROWS, WIDTH).requires_grad_(), torch.ones(WIDTH).requires_grad_()
    torch.library.opcheck(liger_ops.rms_norm_op, (hidden, weight, 1e-5), test_utils=utilities)
    torch.library.opcheck(liger_ops.swiglu_op, (made(ROWS, WIDTH), made(ROWS, WIDTH)), test_utils=utilities)
    torch.library.opcheck(
        liger_ops.swiglu_backward_op, [made(ROWS, WIDTH, seed=s) for s in range(3)], test_utils=utilities
    )


def test_a_release_with_other_arguments_is_named(monkeypatch: pytest.MonkeyPatch):
    norm = importlib.import_module("liger_kernel.ops.rms_norm")
    liger_ops._liger.cache_clear()
    monkeypatch.setattr(norm, "rms_norm_backward", lambda dY, X, W, RSTD: None)
    with pytest.raises(RuntimeError, match=r"liger-kernel 0\.\d+\.\d+ has other functions than .*offset"):
        our_norm(made(ROWS, WIDTH), torch.ones(WIDTH))
