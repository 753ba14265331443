"""The two-part attention equals one masked softmax, forward and backward, at rounding error."""

import pytest
import torch
from vcr1_kernels import reference
from vcr1_kernels.prefix_attention import PrefixGroup, prefix_attention

from tests.kernels.attention_rows import LAYOUTS, SCALE, by_definition, exact, make_inputs, relative_errors, run

UNEQUAL = LAYOUTS["unequal"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_equals_masked_softmax_in_float64(layout, heads, kv_heads, backend):
    inputs = make_inputs(layout, heads, kv_heads, head_dim=16)
    got = run(lambda *x: prefix_attention(*x, layout, SCALE, backend), *inputs)
    for a, b, rtol in zip(got, exact(inputs, layout), (1e-12, 1e-11, 1e-11, 1e-11), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_float32_error_is_that_of_the_plain_path(backend):
    wide = make_inputs(UNEQUAL, 4, 2, head_dim=16)
    inputs = [x.float() for x in wide]
    truth = exact(wide, UNEQUAL)[:1]
    got = run(lambda *x: prefix_attention(*x, UNEQUAL, SCALE, backend), *inputs)[:1]
    [fast], [plain] = (relative_errors(x, truth) for x in (got, by_definition(inputs, UNEQUAL)[:1]))
    assert fast <= 3 * plain + 1e-8


def test_bfloat16_keeps_its_dtype_and_computes_in_float32():
    inputs = make_inputs(UNEQUAL, 4, 2, torch.bfloat16, head_dim=16)[:3]
    out = prefix_attention(*inputs, UNEQUAL, SCALE)
    assert out.dtype == torch.bfloat16
    truth = reference.prefix_attention(*(x.double() for x in inputs), UNEQUAL, SCALE)
    assert relative_errors([out], [truth])[0] < 2**-8  # one rounding of the result; a bfloat16 softmax is at 2e-2


def test_long_rows_by_blocks_equal_dense_scores():
    """Prompts and completions longer than the CPU kernel's blocks, unequal lengths, forward and backward."""
    layout = (PrefixGroup(0, 700, (300, 1, 170)), PrefixGroup(1171, 90, (600,)))
    inputs = make_inputs(layout, 4, 2, torch.float32, head_dim=16)
    dense, blocked = (
        run(lambda *x, backend=backend: prefix_attention(*x, layout, SCALE, backend), *inputs)
        for backend in ("torch", "flash")
    )
    assert max(relative_errors(blocked[1:], [x.double() for x in dense[1:]])) < 2e-6
