"""The Triton kernels against the float64 definition: in the interpreter without a GPU, as compiled with one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vcr1_kernels import prefix_attention_launch as launch
from vcr1_kernels import prefix_attention_triton as host
from vcr1_kernels.prefix_attention import prefix_attention
from vcr1_kernels.prefix_layout import PrefixGroup

from tests.kernels import attention_rows as rows
from tests.kernels.attention_rows import SCALE, by_definition, exact, relative_errors, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter a tile has 16 rows and 32 keys (dK/dV: 32 rows, 16 keys). Ragged ends everywhere; completions
# shorter and longer than a tile, an empty one, several in one tile; a prompt of one token; a group without completions.
LAYOUTS = {
    "ragged": (PrefixGroup(0, 37, (5, 40, 0, 3)), PrefixGroup(85, 1, (2,))),
    "whole_tiles": (PrefixGroup(0, 32, (32,)), PrefixGroup(64, 3, ())),
}


def make_inputs(layout, heads, kv_heads, head_dim, dtype):
    """Each a part of a larger tensor full of NaN, which shows reads outside of the row."""
    parts = []
    for x in rows.make_inputs(layout, heads, kv_heads, dtype, head_dim, DEVICE):
        padded = x.new_full((len(x) + 128, *x.shape[1:]), float("nan"))
        padded[64:-64] = x
        parts.append(padded[64:-64])
    return parts


def in_triton(inputs, layout):
    return run(lambda *x: prefix_attention(*x, layout, SCALE, backend="triton"), *inputs)


def assert_as_exact_as_the_plain_path(inputs, layout):
    """Errors of out, dQ, dK, dV against float64, beside those of the plain masked softmax in the type of the inputs."""
    want = exact(inputs, layout)
    plain = relative_errors(by_definition(inputs, layout), want)
    got = in_triton(inputs, layout)
    assert [x.dtype for x in got] == [inputs[0].dtype] * 4
    # 3: backward makes the probabilities again from the log-sum-exp, autograd has kept them (1.6 was seen, in float32)
    for error, allowed in zip(relative_errors(got, want), plain, strict=True):
        assert error <= 3 * allowed  # NaN fails


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: an element that no kernel writes, or one read before it is written, shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


# head dimension 24 is padded to 32; float32 products are full float32
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(4, 2, 16, torch.float32), (3, 1, 24, torch.float32), (3, 1, 24, torch.float16)],
    ids=["float32", "padded_float32", "padded_float16"],
)
def test_equals_the_definition(poisoned_memory, layout, heads, kv_heads, head_dim, dtype):
    assert_as_exact_as_the_plain_path(make_inputs(layout, heads, kv_heads, head_dim, dtype), layout)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (80, torch.float32)])
def test_shipped_tile_sizes_equal_the_definition(monkeypatch, head_dim, dtype):
    """The constants a GPU runs with; the other tests here have smaller tiles."""
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    layout = (PrefixGroup(0, 200, (130, 20, 50)),)
    assert_as_exact_as_the_plain_path(make_inputs(layout, 2, 1, head_dim, dtype), layout)


@pytest.mark.parametrize("wanted_programs", [0, 10**9], ids=["all_heads_in_one_program", "a_program_for_each_head"])
def test_query_heads_of_a_key_head_add_up_however_they_are_spread(monkeypatch, wanted_programs):
    monkeypatch.setattr(host, "_WANTED_PROGRAMS", wanted_programs)
    layout = (PrefixGroup(0, 20, (7, 3)),)
    assert_as_exact_as_the_plain_path(make_inputs(layout, 4, 1, 16, torch.float32), layout)


def test_head_splits_divide_the_heads():
    assert host.head_splits(8, num_tiles=10_000, num_key_heads=2) == 1
    assert host.head_splits(7, num_tiles=100, num_key_heads=4) == 7
    assert host.head_splits(8, num_tiles=100, num_key_heads=4) == 4  # 1,600 programs; 2 would be 800
    assert host.head_splits(1, num_tiles=1, num_key_heads=1) == 1


def test_same_bits_twice_and_from_other_strides():
    """Heads-first storage, as a transposed [H, T, C] has it, is read in place; no atomics, so bits repeat."""
    layout = (PrefixGroup(0, 20, (7, 3)),)
    inputs = make_inputs(layout, 2, 1, 16, torch.float32)
    first = in_triton(inputs, layout)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not heads_first[0].is_contiguous()
    for again in (inputs, heads_first):
        assert all(torch.equal(a, b) for a, b in zip(first, in_triton(again, layout), strict=True))


def test_large_scores_do_not_overflow():
    """All scores near 450: exp overflows float32 without the running maximum. No worse than the plain softmax."""
    layout = (PrefixGroup(0, 20, (7, 3)),)
    inputs = make_inputs(layout, 2, 1, 16, torch.float32)
    inputs[0][..., 0], inputs[1][..., 0] = 50.0, 30.0
    assert_as_exact_as_the_plain_path(inputs, layout)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"), [(torch.float64, 16, "got torch.float64"), (torch.float32, 136, "up to 128")]
)
def test_refuses_what_it_has_no_kernel_for(dtype, head_dim, message):
    x = torch.zeros(3, 1, head_dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        prefix_attention(x, x, x, (PrefixGroup(0, 3, ()),), 1.0, backend="triton")


lengths = st.integers(0, 40)
layouts = st.lists(st.tuples(st.integers(1, 60), st.lists(lengths, max_size=5)), min_size=1, max_size=3)
tile_sizes = st.sampled_from([1, 4, 16, 64])


def build_layout(drawn):
    groups, start = [], 0
    for prompt_len, completion_lens in drawn:
        groups.append(PrefixGroup(start, prompt_len, tuple(completion_lens)))
        start = groups[-1].end
    return tuple(groups)


def visible_pairs(layout):
    """[T, T] bool by the definition: group, and prompt or the same completion."""
    num_tokens = layout[-1].end
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for group in layout:
        visible[group.prompt_end : group.end, group.start : group.prompt_end] = True
        start = group.start
        for length in (group.prompt_len, *group.completion_lens):
            visible[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
            start += length
    return visible


@settings(max_examples=60)
@given(layouts, tile_sizes, tile_sizes)
def test_query_tiles_reach_every_visible_pair_once(drawn, rows, keys):
    layout = build_layout(drawn)
    visible = visible_pairs(layout)
    seen = torch.zeros(visible.shape, dtype=torch.int32)
    own = torch.tensor(host.own_starts(layout))
    for first, last, prefix_start, prefix_end, own_begin, own_full_end in host.query_tiles(layout, rows, keys):
        assert 0 < last - first <= rows and (own_full_end - own_begin) % keys == 0
        seen[first:last, prefix_start:prefix_end] += 1
        seen[first:last, own_begin:own_full_end] += 1  # without a mask
        key, row = torch.arange(own_full_end, last), torch.arange(first, last)
        seen[first:last, own_full_end:last] += (key >= own[row, None]) & (key <= row[:, None])
    assert torch.equal(seen, visible.int())


@settings(max_examples=60)
@given(layouts, tile_sizes)
def test_key_tiles_reach_every_visible_pair_once(drawn, keys):
    layout = build_layout(drawn)
    visible = visible_pairs(layout)
    seen = torch.zeros(visible.shape, dtype=torch.int32)
    own = torch.tensor(host.own_starts(layout))
    for first, last, row_begin, row_full, row_end in host.key_tiles(layout, keys):
        assert 0 < last - first <= keys and row_full > row_begin
        key, row = torch.arange(first, last), torch.arange(row_begin, row_full)
        seen[row_begin:row_full, first:last] += (key >= own[row, None]) & (key <= row[:, None])
        seen[row_full:row_end, first:last] += 1  # without a mask
    assert torch.equal(seen, visible.int())


def test_tiles_with_most_work_come_first():
    layout = (PrefixGroup(0, 300, (64, 64)),)
    work = [t[3] - t[2] + t[1] - t[4] for t in host.query_tiles(layout, 64, 32)]
    assert work == sorted(work, reverse=True)
    work = [t[4] - t[2] for t in host.key_tiles(layout, 64)]
    assert work == sorted(work, reverse=True)
