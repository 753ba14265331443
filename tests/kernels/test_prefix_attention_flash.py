"""The two flash calls and their merge, with a dense stand-in for the flash ops: same arguments, same lse layout."""

import inspect
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vcr1_kernels import prefix_attention_flash as flash
from vcr1_kernels.flash_routes import AtenOps
from vcr1_kernels.prefix_attention import IMPLEMENTATIONS, prefix_attention
from vcr1_kernels.prefix_layout import PrefixGroup

from tests.kernels.attention_rows import LAYOUTS, SCALE, exact, make_inputs, relative_errors, run


def segment_slices(cu_q, cu_k, max_q, max_k):
    """Checks what the CUDA ops want of the tables, then yields (query rows, key rows) of each segment."""
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
    q, k = cu_q.tolist(), cu_k.tolist()
    assert len(q) == len(k)
    lengths_q, lengths_k = ([b - a for a, b in itertools.pairwise(x)] for x in (q, k))
    assert min(lengths_q) > 0 and min(lengths_k) > 0, "an empty segment: what the ops do there differs by version"
    assert (max(lengths_q), max(lengths_k)) == (max_q, max_k)
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def segment_scores(query, key, rows, keys, is_causal, scale):
    """[H, Lq, Lk] in float64."""
    repeats = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhc,khc->hqk", query[rows].double(), key[keys].double().repeat_interleave(repeats, 1))
    scores = scores * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")) if is_causal else scores


def dense_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None
):
    """aten::_flash_attention_forward, dense."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    out = torch.empty_like(query)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=lse_dtype)
    covered = 0
    for rows, keys in segment_slices(cum_seq_q, cum_seq_k, max_q, max_k):
        scores = segment_scores(query, key, rows, keys, is_causal, scale)
        values = value[keys].double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[rows] = torch.einsum("hqk,khc->qhc", scores.softmax(-1), values).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1).to(lse_dtype)
        covered += rows.stop - rows.start
    assert covered == len(query)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def dense_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
):
    """aten::_flash_attention_backward, dense: probabilities and delta come from the lse and out that are given."""
    assert dropout_p == 0.0 and rng_state.dtype == torch.uint64
    assert logsumexp.shape == (query.shape[1], query.shape[0]) and logsumexp.is_contiguous()
    assert grad_out.is_contiguous() and out.is_contiguous()  # the CUDA op would copy them
    repeats = query.shape[1] // key.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value))
    for rows, keys in segment_slices(cum_seq_q, cum_seq_k, max_q, max_k):
        scores = segment_scores(query, key, rows, keys, is_causal, scale)
        probs = torch.exp(scores - logsumexp[:, rows, None].double())
        grad = grad_out[rows].double()
        delta = (grad * out[rows].double()).sum(-1).T.unsqueeze(-1)
        values, many_keys = (x[keys].double().repeat_interleave(repeats, 1) for x in (value, key))
        grad_scores = probs * (torch.einsum("qhc,khc->hqk", grad, values) - delta) * scale
        dq[rows] = torch.einsum("hqk,khc->qhc", grad_scores, many_keys)
        dk[keys] += torch.einsum("hqk,qhc->khc", grad_scores, query[rows].double()).unflatten(1, (-1, repeats)).sum(2)
        dv[keys] += torch.einsum("hqk,qhc->khc", probs, grad).unflatten(1, (-1, repeats)).sum(2)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


@pytest.fixture
def dense_aten(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", dense_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", dense_backward)
    return flash.FlashAttention(AtenOps())


@pytest.mark.parametrize(
    ("stand_in", "name"),
    [(dense_forward, "_flash_attention_forward"), (dense_backward, "_flash_attention_backward")],
)
def test_stand_ins_have_the_arguments_of_the_real_ops(stand_in, name):
    real = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
    ours = list(inspect.signature(stand_in).parameters)
    positional = [n for n in ours if n != "scale"]
    assert real[: len(positional)] == positional
    assert "scale" in real[len(positional) :]


def assert_equals_one_softmax(attention, layout, heads, kv_heads):
    """Forward and backward of a `FlashAttention`, in float64."""
    query, key, value, grad = inputs = make_inputs(layout, heads, kv_heads)
    out, lse = attention.forward(query, key, value, layout, SCALE)
    grads = attention.backward(grad, (query, key, value, out, lse), layout, SCALE)
    for got, want in zip((out, *grads), exact(inputs, layout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_two_calls_and_the_merge_equal_one_softmax(dense_aten, layout, heads, kv_heads):
    assert_equals_one_softmax(dense_aten, layout, heads, kv_heads)


def test_the_built_in_backward_keeps_no_tensor_for_another_mode() -> None:
    """A tensor made under one fake mode cannot be used under the next, as those of two compilations are."""
    for _ in range(2):
        with FakeTensorMode():
            query, key, value, out, grad = torch.empty(5, 6, 2, 16, device="cuda", dtype=torch.bfloat16)
            lse, ends = torch.empty(2, 6, device="cuda"), torch.empty(2, device="cuda", dtype=torch.int32)
            segments = flash.Segments(ends, ends, 6, 6, causal=True)
            grads = AtenOps().backward(grad, (query, key, value, out, lse), segments, 0.25)
        assert [x.shape for x in grads] == [query.shape] * 3


class RecordingOps(AtenOps):
    def __init__(self):
        self.calls = []

    def forward(self, query_THC, key_TKC, value_TKC, segments, scale):
        self.calls.append((query_THC, key_TKC, value_TKC))
        return super().forward(query_THC, key_TKC, value_TKC, segments, scale)


def test_one_group_is_read_in_place(dense_aten):
    layout = (PrefixGroup(0, 9, (3, 2, 4)),)
    query, key, value, _grad = make_inputs(layout, 4, 2)
    ops = RecordingOps()
    flash.FlashAttention(ops).forward(query, key, value, layout, 0.3)
    (_q, key_a, value_a), (query_b, key_b, value_b) = ops.calls
    assert key_a is key and value_a is value
    assert key_b.data_ptr() == key.data_ptr() and value_b.data_ptr() == value.data_ptr()
    assert query_b.data_ptr() == query[9:].data_ptr()
    assert len(key_b) == 9  # the prompt once, not once for each completion


def test_another_shape_of_lse_is_refused():
    """Older flash attention pads it to [B, H, longest]."""

    class PaddedLse:
        name = "old flash"

        def forward(self, query_THC, *_rest):
            return query_THC, torch.zeros(2, 1, 3)

    layout = (PrefixGroup(0, 3, (2,)),)
    query, key, value, _grad = make_inputs(layout, 1, 1)
    with pytest.raises(RuntimeError, match=r"old flash gave .* \(2, 1, 3\), wanted \[H, T\] = \(1, 5\)"):
        flash.FlashAttention(PaddedLse()).forward(query, key, value, layout, 0.3)


def test_several_groups_copy_each_prompt_once(dense_aten):
    layout = (PrefixGroup(0, 9, (3, 2, 4)), PrefixGroup(18, 5, (2, 2)), PrefixGroup(27, 6, ()))
    query, key, value, _grad = make_inputs(layout, 4, 2)
    ops = RecordingOps()
    flash.FlashAttention(ops).forward(query, key, value, layout, 0.3)
    assert len(ops.calls) == 2
    assert [len(x) for x in ops.calls[1]] == [13, 14, 14]  # queries; prompts that have completions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [LAYOUTS["unequal"], LAYOUTS["two_groups"]], ids=["one_group", "two_groups"])
def test_public_function_on_flash_with_float32_queries(dense_aten, monkeypatch, dtype, layout):
    """As rotary embedding under autocast hands them over; the bound is a few roundings of the type."""
    monkeypatch.setitem(IMPLEMENTATIONS, "flash", dense_aten)
    inputs = make_inputs(layout, 4, 2, dtype)
    given = [x.float() if i < 2 else x for i, x in enumerate(inputs)]
    got = run(lambda *x: prefix_attention(*x, layout, SCALE, backend="flash"), *given)
    assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32, dtype]
    assert max(relative_errors(got, exact(inputs, layout))) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", [LAYOUTS["unequal"], LAYOUTS["two_groups"]], ids=["one_group", "two_groups"])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_merge_kernel_equals_its_torch_twin(layout, head_dim):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    plan = flash.make_plan(layout, device)
    num_rows, num_tokens = len(plan.completion_rows), layout[-1].end
    shapes = [(num_tokens, 3, head_dim), (3, num_tokens), (num_rows, 3, head_dim), (3, num_rows)]
    # log-sum-exps far apart too: one side must then win without an overflow
    scales = [1.0, 60.0, 1.0, 60.0]
    tensors = [torch.randn(s, generator=generator).mul(f).to(device) for s, f in zip(shapes, scales, strict=True)]
    want = [x.double() for x in tensors]
    flash.merge_rows(*want, plan.completions)
    flash.merge_in_triton(*tensors, plan)
    for got, expected in zip(tensors[:2], want[:2], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
