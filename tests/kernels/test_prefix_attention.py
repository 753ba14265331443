"""The two-part attention equals one masked softmax, forward and backward, at rounding error."""

import pytest
import torch
from vcr1_kernels import reference
from vcr1_kernels.prefix_attention import PrefixGroup, prefix_attention

# One completion; unequal lengths; an empty completion in the middle; only empty ones; two groups in a row;
# a prompt of one token (its causal part is a single 1 x 1 softmax).
LAYOUTS = {
    "single": (PrefixGroup(0, 5, (3,)),),
    "unequal": (PrefixGroup(0, 7, (1, 6, 3, 2)),),
    "empty_completion": (PrefixGroup(0, 4, (3, 0, 2)),),
    "all_empty": (PrefixGroup(0, 4, (0, 0)),),
    "no_completions": (PrefixGroup(0, 4, ()),),
    "two_groups": (PrefixGroup(0, 6, (2, 5)), PrefixGroup(13, 1, (4, 1, 0))),
}


def make_inputs(layout, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout[-1].end, n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_equals_masked_softmax_in_float64(layout, heads, kv_heads, backend):
    fast, plain = (make_inputs(layout, heads, kv_heads, torch.float64) for _ in range(2))
    out = prefix_attention(*fast, layout, 0.25, backend)
    expected = reference.prefix_attention(*plain, layout, 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(direction)
    expected.backward(direction)
    for got, want in zip(fast, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    layout = LAYOUTS["two_groups"]
    inputs = make_inputs(layout, 2, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, layout, 0.25), inputs)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_float32_error_is_that_of_the_plain_path(backend):
    layout = LAYOUTS["unequal"]
    truth = reference.prefix_attention(*make_inputs(layout, 4, 2, torch.float64), layout, 0.25)
    inputs = make_inputs(layout, 4, 2, torch.float32)
    fast = relative_error(prefix_attention(*inputs, layout, 0.25, backend), truth)
    plain = relative_error(reference.prefix_attention(*inputs, layout, 0.25), truth)
    assert fast <= 3 * plain + 1e-8


def test_bfloat16_keeps_its_dtype_and_computes_in_float32():
    layout = LAYOUTS["unequal"]
    inputs = [x.detach().bfloat16() for x in make_inputs(layout, 4, 2, torch.float64)]
    out = prefix_attention(*inputs, layout, 0.25)
    truth = reference.prefix_attention(*(x.double() for x in inputs), layout, 0.25)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth) < 2**-8  # one rounding of the result; a bfloat16 softmax is at 2e-2


def test_long_rows_by_blocks_equal_dense_scores():
    """Prompts and completions longer than the CPU kernel's blocks, unequal lengths, forward and backward."""
    layout = (PrefixGroup(0, 700, (300, 1, 170)), PrefixGroup(1171, 90, (600,)))
    dense, blocked = (make_inputs(layout, 4, 2, torch.float32) for _ in range(2))
    direction = torch.randn(layout[-1].end, 4, 16, generator=torch.Generator().manual_seed(1))
    for inputs, backend in ((dense, "torch"), (blocked, "flash")):
        prefix_attention(*inputs, layout, 0.25, backend).backward(direction)
    for got, want in zip(blocked, dense, strict=True):
        assert got.grad is not None and want.grad is not None
        assert relative_error(got.grad, want.grad.double()) < 2e-6


def test_siblings_do_not_see_each_other():
    layout = (PrefixGroup(0, 4, (3, 3)),)
    query, key, value = make_inputs(layout, 2, 2, torch.float64)
    before = prefix_attention(query, key, value, layout, 0.25)
    with torch.no_grad():
        value[4:7] += 1.0  # the first completion's values
    after = prefix_attention(query, key, value, layout, 0.25)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((PrefixGroup(0, 3, (2,)),), "covers 5 tokens, but the row has 9"),
        ((PrefixGroup(1, 3, (5,)),), "wanted start 0"),
        ((PrefixGroup(0, 0, (9,)),), "prompt_len >= 1"),
    ],
)
def test_bad_layouts_are_refused(layout, message):
    x = torch.zeros(9, 2, 4)
    with pytest.raises(ValueError, match=message):
        prefix_attention(x, x, x, layout, 1.0)


def test_query_heads_must_be_a_multiple_of_key_heads():
    layout = (PrefixGroup(0, 3, ()),)
    with pytest.raises(ValueError, match="3 query heads, 2 key heads"):
        prefix_attention(torch.zeros(3, 3, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), layout, 1.0)
