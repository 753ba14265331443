"""Real kernels in bfloat16: error beside that of separate rows, no repeated prompt, no wait for the GPU."""

import pytest
import torch
from vcr1_kernels.prefix_attention import attention_backend, prefix_attention
from vcr1_kernels.prefix_layout import PrefixGroup

from tests.kernels import attention_rows as rows
from tests.kernels.attention_rows import exact, relative_errors, run

pytestmark = pytest.mark.gpu
BACKENDS = ["flash", "triton"]
LAYOUTS = {
    "one_group": (PrefixGroup(0, 1000, (300, 17, 128, 1)),),
    "g_1": (PrefixGroup(0, 513, (200,)),),
    "empty_completions": (PrefixGroup(0, 256, (0, 100, 0)),),
    "no_completions": (PrefixGroup(0, 300, ()),),
    "several_groups": (PrefixGroup(0, 300, (5, 200)), PrefixGroup(505, 1, (64, 3, 0)), PrefixGroup(573, 130, ())),
    "long_prompt": (PrefixGroup(0, 4096, (300,) * 8),),
}


def make_inputs(layout, heads, kv_heads, head_dim, dtype=torch.bfloat16):
    return rows.make_inputs(layout, heads, kv_heads, dtype, head_dim, "cuda")


def separate_rows(query, key, value, layout, scale):
    """[prompt | c_i] rows, one scaled_dot_product_attention each: what training without packing computes."""
    out = torch.zeros_like(query)
    for group in layout:
        start = group.prompt_end
        prompt = torch.arange(group.start, group.prompt_end, device="cuda")
        for index, length in enumerate((*group.completion_lens, 0)):  # a last one without tokens gives the prompt rows
            rows = torch.cat([prompt, torch.arange(start, start + length, device="cuda")])
            parts = (x[rows].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            result = torch.nn.functional.scaled_dot_product_attention(
                *parts, is_causal=True, scale=scale, enable_gqa=True
            )[0]
            is_last = index == len(group.completion_lens)
            kept = slice(None) if is_last else slice(group.prompt_len, None)
            out = out.index_copy(0, rows[kept], result.transpose(0, 1)[kept])
            start += length
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(7, 1, 128), (8, 1, 64), (4, 4, 80)], ids=["7:1", "8:1", "mha_80"]
)
def test_error_is_at_most_that_of_separate_rows(backend, layout, heads, kv_heads, head_dim):
    inputs = make_inputs(layout, heads, kv_heads, head_dim)
    scale = head_dim**-0.5
    want = exact(inputs, layout, scale)
    plain = relative_errors(run(lambda *x: separate_rows(*x, layout, scale), *inputs), want)
    got = run(lambda *x: prefix_attention(*x, layout, scale, backend=backend), *inputs)
    for name, error, allowed in zip(("out", "dq", "dk", "dv"), relative_errors(got, want), plain, strict=True):
        assert error <= 1.5 * allowed, f"{name}: {error:.2e}, separate rows {allowed:.2e}"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_is_full_float32(head_dim):
    layout = LAYOUTS["several_groups"]
    inputs = make_inputs(layout, 4, 2, head_dim, torch.float32)
    assert attention_backend("cuda", torch.float32, head_dim).name == "triton"
    got = run(lambda *x: prefix_attention(*x, layout, 0.1), *inputs)
    want = exact(inputs, layout, 0.1)
    assert max(relative_errors(got, want)) < 3e-6  # tf32 products would leave 3e-4


def test_float32_queries_beside_bfloat16_values_under_autocast():
    layout = LAYOUTS["one_group"]
    query, key, value, grad = make_inputs(layout, 8, 2, 128)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = run(lambda *x: prefix_attention(*x, layout, 0.1), query.float(), key.float(), value, grad)
    half = run(lambda *x: prefix_attention(*x, layout, 0.1), query, key, value, grad)
    assert torch.equal(mixed[0], half[0])


def test_default_is_flash():
    choice = attention_backend("cuda")
    assert choice.name == "flash", choice.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompt_is_not_repeated(backend):
    """Peak memory of a forward stays under that of the result and part (B); G copies of K and V would take 134 MB."""
    num_completions, length, prompt_len, heads, kv_heads, head_dim = 8, 128, 8192, 16, 4, 128
    layout = (PrefixGroup(0, prompt_len, (length,) * num_completions),)
    query, key, value, _grad = make_inputs(layout, heads, kv_heads, head_dim)
    prefix_attention(query, key, value, layout, 0.1, backend=backend)  # tables and compiled kernels exist now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        prefix_attention(query, key, value, layout, 0.1, backend=backend)
    peak = torch.cuda.max_memory_allocated() - before
    result = 2 * query.numel() + 4 * heads * len(query)
    part_b = 2 * num_completions * length * heads * head_dim + 8 * heads * num_completions * length
    repeated = 2 * 2 * num_completions * prompt_len * kv_heads * head_dim
    assert peak <= result + part_b + 8 * 2**20  # and 8 MB for the flash kernel's own tables
    assert repeated > 8 * 2**20 + part_b
    for event in profile.events():
        rows = max((shape[0] for shape in event.input_shapes if shape and isinstance(shape[0], int)), default=0)
        assert rows < num_completions * prompt_len, f"{event.name} worked on {event.input_shapes}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_never_waits_for_the_gpu(backend):
    inputs = make_inputs(LAYOUTS["several_groups"], 4, 2, 128)
    run(lambda *x: prefix_attention(*x, LAYOUTS["several_groups"], 0.1, backend=backend), *inputs)  # compiles kernels
    layout = (PrefixGroup(0, 211, (17, 4)), PrefixGroup(232, 9, (30,)))  # not seen before: its tables are made now
    inputs = make_inputs(layout, 4, 2, 128)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(lambda *x: prefix_attention(*x, layout, 0.1, backend=backend), *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_gives_the_same_bits_twice():
    layout = LAYOUTS["one_group"]
    inputs = make_inputs(layout, 8, 2, 128)
    first, second = (run(lambda *x: prefix_attention(*x, layout, 0.1, backend="triton"), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_compiles_once_for_all_lengths():
    from vcr1_kernels.device.prefix_attention import prefix_forward_kernel
    from vcr1_kernels.device.prefix_attention_backward import prefix_dkdv_kernel

    kernels = (prefix_forward_kernel, prefix_dkdv_kernel)

    def builds() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def train_on(prompt_len: int) -> None:
        layout = (PrefixGroup(0, prompt_len, (33, 40)),)
        inputs = make_inputs(layout, 8, 2, 128)
        run(lambda *x: prefix_attention(*x, layout, 0.1, backend="triton"), *inputs)

    train_on(511)
    before = builds()
    for prompt_len in (512, 513, 1):
        train_on(prompt_len)
    assert builds() == before
