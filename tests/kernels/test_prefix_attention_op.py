"""prefix_attention as a registered op: fakes, torch.compile, autograd rules, and how the back end is chosen."""

import pytest
import torch
from vcr1_kernels import reference
from vcr1_kernels._ops import ops
from vcr1_kernels.flash_routes import flash_ops
from vcr1_kernels.prefix_attention import _choice, attention_backend, prefix_attention
from vcr1_kernels.prefix_layout import layout_to_tensor

from tests.kernels import attention_rows

LAYOUT = attention_rows.LAYOUTS["two_groups"]


def make_inputs(dtype=torch.float32):
    return [x.requires_grad_() for x in attention_rows.make_inputs(LAYOUT, 4, 2, dtype)[:3]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_registration(backend):
    """Schema, fakes (shapes, strides, types), autograd registration, and tracing with static and dynamic shapes."""
    inputs = make_inputs()
    numbers = layout_to_tensor(LAYOUT)
    # the dynamic trace would give the kernels symbolic lengths; static is what a layout of host ints means
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        ops.prefix_attention_forward.default, (*inputs, numbers, 0.3, backend), test_utils=checks, rtol=1e-4, atol=1e-5
    )
    detached = [x.detach() for x in inputs]
    out, lse = ops.prefix_attention_forward(*detached, numbers, 0.3, backend)
    arguments = (torch.ones_like(out), *detached, out, lse, numbers, 0.3, backend)
    torch.library.opcheck(
        ops.prefix_attention_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_without_a_graph_break():
    inputs = make_inputs()
    compiled = torch.compile(
        lambda q, k, v: prefix_attention(q, k, v, LAYOUT, 0.3) * 2, backend="aot_eager", fullgraph=True
    )
    out = compiled(*inputs)
    out.sum().backward()
    got = [out, *(x.grad for x in inputs)]
    plain = make_inputs()
    want = prefix_attention(*plain, LAYOUT, 0.3) * 2
    want.sum().backward()
    for a, b in zip(got, (want, *(x.grad for x in plain)), strict=True):
        assert torch.equal(a, b)


def test_second_derivative_is_refused():
    inputs = make_inputs(torch.float64)
    out = prefix_attention(*inputs, LAYOUT, 0.3)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_backward_twice_with_retain_graph_gives_the_same():
    inputs = make_inputs()
    loss = prefix_attention(*inputs, LAYOUT, 0.3).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_without_tokens(backend):
    inputs = [torch.zeros(0, n, 16, requires_grad=True) for n in (4, 2, 2)]
    out = prefix_attention(*inputs, (), 0.3, backend=backend)
    assert out.shape == (0, 4, 16)
    out.sum().backward()
    assert [tuple(x.grad.shape) for x in inputs] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_autocast_does_not_reach_the_softmax():
    inputs = make_inputs()
    truth = reference.prefix_attention(*(x.double() for x in inputs), LAYOUT, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefix_attention(*inputs, LAYOUT, 0.3)
    assert out.dtype == torch.float32
    assert (out - truth).norm() <= 1e-6 * truth.norm()


def test_choice_without_a_gpu():
    assert attention_backend("cpu", torch.float32) == ("flash", "torch's flash attention for CPUs")
    assert attention_backend("cpu", torch.float64).name == "torch"


@pytest.fixture
def pretend_hopper(monkeypatch):
    """The answers of an H200 to the questions that the choice asks; nothing runs there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    clear_choices()
    yield
    clear_choices()


def clear_choices():
    _choice.cache_clear()
    flash_ops.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "name", "reason"),
    [
        (torch.bfloat16, 128, "flash", "torch's built-in flash attention"),
        (torch.float16, 80, "flash", "built-in"),
        (torch.bfloat16, 256, "flash", "built-in"),
        (torch.float32, 128, "triton", "no torch.float32"),
        (torch.bfloat16, 68, "triton", "68 dimensions"),
        (torch.float32, 256, "torch", "up to 128"),
        (torch.float64, 128, "torch", "float64"),
    ],
)
def test_choice_on_a_gpu(pretend_hopper, dtype, head_dim, name, reason):
    choice = attention_backend("cuda", dtype, head_dim)
    assert choice.name == name
    assert reason in choice.reason


def test_choice_on_a_gpu_without_any_flash(pretend_hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    choice = attention_backend("cuda")
    assert choice.name == "triton"
    assert "built without flash" in choice.reason


def test_choice_on_an_old_gpu(pretend_hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    choice = attention_backend("cuda")
    assert choice.name == "torch"
    assert "7.5" in choice.reason
