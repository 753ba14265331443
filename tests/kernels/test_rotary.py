"""Rotary embedding: the op's twin and its kernel against transformers' own functions, forward and backward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from vcr1_kernels import reference, rotary

BACKENDS = ["torch", "triton"]
STEP = 2**-7  # of a bfloat16 value to the next; Triton's interpreter cuts off where a GPU rounds
TOKENS, QUERIES, KEYS = 37, 6, 3  # more than two blocks of 16 tokens, heads that are no multiple of 4


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    return request.param


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(head_dim: int, *axes: int) -> tuple[Tensor, Tensor]:
    """Angles that differ in both halves, so that no half can stand in for the other."""
    angles = 3 * made(5, *axes, TOKENS, head_dim)
    return angles.cos(), angles.sin()


def results(function: Any, query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    """Both outputs and the gradients of a random combination of them."""
    leaves = [x.detach().requires_grad_() for x in (query, key)]
    outs = function(*leaves, *rest)
    cotangents = [made(seed, *out.shape).to(out.dtype) for seed, out in enumerate(outs, 7)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, cotangents)]


def stock_text(query_THC: Tensor, key_TKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, ...]:
    function = modeling_qwen2_5_vl.apply_rotary_pos_emb
    batch = [x.transpose(0, 1).unsqueeze(0) for x in (query_THC, key_TKC)]
    return tuple(x[0].transpose(0, 1) for x in function(*batch, cos_TC.unsqueeze(0), sin_TC.unsqueeze(0)))


@pytest.mark.parametrize("head_dim", [16, 20, 80])
@pytest.mark.skipif(not hasattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb"), reason="another function before 5.17")
def test_values_and_gradients_are_those_of_the_decoder(backend, head_dim):
    inputs = (made(0, TOKENS, QUERIES, head_dim), made(1, TOKENS, KEYS, head_dim), *tables(head_dim))
    expected = results(stock_text, *inputs)
    for got, value in zip(results(lambda *x: rotary(*x, backend=backend), *inputs), expected, strict=True):
        torch.testing.assert_close(got, value, atol=1e-6, rtol=1e-6)


def test_values_and_gradients_are_those_of_the_tower(backend):
    """Bfloat16 slices of one product of queries, keys and values, float32 tables: both round once, from float32."""
    joint = made(0, TOKENS, 3, 4, 80).bfloat16()
    inputs = (joint[:, 0], joint[:, 1], *tables(80))
    assert not inputs[0].is_contiguous()
    for got, value in zip(
        results(lambda *x: rotary(*x, backend=backend), *inputs),
        results(apply_rotary_pos_emb_vision, *inputs),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        assert (got.float() - value.float()).abs().le(STEP * value.float().abs() + 1e-6).all()


def test_bfloat16_is_rounded_once(backend):
    """transformers' function of the decoder rounds three times."""
    inputs = [x.bfloat16() for x in (made(0, TOKENS, QUERIES, 16), made(1, TOKENS, KEYS, 16), *tables(16))]
    exact = reference.rotary(*(x.double() for x in inputs))
    for got, value in zip(rotary(*inputs, backend=backend), exact, strict=True):
        error = (got.double() - value).abs()
        assert error.le((STEP / 2 if backend == "torch" else STEP) * value.abs() + 1e-6).all()


SECTIONS = (2, 3, 3)


def axis_of(column: int, interleaved: bool) -> int:
    """By hand, of a half with 8 columns. Interleaved t h w t h w t h: the eighth is of height, whose third it is."""
    return [0, 1, 2, 0, 1, 2, 0, 1][column] if interleaved else [0, 0, 1, 1, 1, 2, 2, 2][column]


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_column_turns_with_the_axis_of_its_section(backend, interleaved):
    sections = (3, 3, 2) if interleaved else SECTIONS
    cos_3TC, sin_3TC = tables(16, 3)
    query, key = made(0, TOKENS, QUERIES, 16), made(1, TOKENS, KEYS, 16)
    axes = [axis_of(column % 8, interleaved) for column in range(16)]
    chosen = [torch.stack([x[axis, :, c] for c, axis in enumerate(axes)], -1) for x in (cos_3TC, sin_3TC)]
    got = results(
        lambda *x: rotary(*x, sections, interleaved=interleaved, backend=backend), query, key, cos_3TC, sin_3TC
    )
    for value, expected in zip(got, results(reference.rotary, query, key, *chosen), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(
    not hasattr(Qwen3VLTextRotaryEmbedding, "recomposition_frequencies"), reason="another name before 5.17"
)
def test_interleaved_sections_are_those_of_qwen3_vl():
    half_3BTc = made(0, 3, 1, TOKENS, 8)
    holder = type("Embedding", (), {"mrope_section": (3, 3, 2)})()
    expected = Qwen3VLTextRotaryEmbedding.recomposition_frequencies(holder, half_3BTc.clone())
    both_3TC = torch.cat([half_3BTc, half_3BTc], -1)[:, 0]
    got = reference._of_axes(both_3TC, (3, 3, 2), interleaved=True)
    assert torch.equal(got[:, : expected.shape[-1]], expected[0])


def test_the_sections_of_the_text_model_are_those_of_transformers():
    """Its release decides whether the tables come by axis (before 5.17) or are put together by the embedding."""
    half_3BTc = made(0, 3, 1, TOKENS, 8)
    both_3TC = torch.cat([half_3BTc, half_3BTc], -1)[:, 0]
    got = reference._of_axes(both_3TC, SECTIONS, interleaved=False)
    if hasattr(modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding, "recomposition_frequencies"):
        holder = type("Embedding", (), {"mrope_section": list(SECTIONS)})()
        embedding: Any = modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding
        assert torch.equal(got, embedding.recomposition_frequencies(holder, half_3BTc)[0])
    else:
        function = modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb
        assert "mrope_section" in inspect.signature(function).parameters


def test_gradients_of_the_definition_in_float64():
    inputs = [x.double().requires_grad_() for x in (made(0, 3, 2, 4), made(1, 3, 1, 4))]
    angles = made(2, 3, 4).double()
    assert torch.autograd.gradcheck(lambda *x: rotary(*x, angles.cos(), angles.sin(), backend="torch"), inputs)


def test_no_tokens_give_no_rows(backend):
    empty = torch.zeros(0, 2, 8)
    query, key = rotary(empty, empty[:, :1], torch.zeros(0, 8), torch.zeros(0, 8), backend=backend)
    assert (query.shape, key.shape) == ((0, 2, 8), (0, 1, 8))


@pytest.mark.parametrize("triton", [False, True])
def test_operator_is_registered_well(triton):
    if triton and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    query, key = (x.requires_grad_() for x in (made(0, 5, 2, 16), made(1, 5, 1, 16)))
    cos, sin = (x[:5] for x in tables(16))
    torch.library.opcheck(torch.ops.vcr1_kernels.rotary, (query, key, cos, sin, [], False, False, triton))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "table"), [(128, torch.bfloat16), (80, torch.float32)])
def test_gpu_kernel_agrees_with_the_definition(head_dim, table):
    inputs = [made(0, TOKENS, 28, head_dim).bfloat16(), made(1, TOKENS, 4, head_dim).bfloat16()]
    inputs += [x.to(table) for x in tables(head_dim)]
    inputs = [x.cuda() for x in inputs]
    exact = reference.rotary(*(x.double() for x in inputs))
    for got, value in zip(rotary(*inputs), exact, strict=True):
        assert (got.double() - value).abs().le(2**-8 * value.abs() + 1e-6).all()
