"""fused_linear_logprob against the dense definition in float64: values, gradients, keeps, edge cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vcr1_kernels import fused_linear_logprob, linear_logprob, reference
from vcr1_kernels.head_chunks import auto_chunk_rows, largest_chunk, num_waves, row_chunks
from vcr1_kernels.linear_logprob import can_keep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
HIDDEN, VOCAB = 24, 203


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(num_rows: int, dtype: torch.dtype = torch.float32, vocab: int = VOCAB, hidden: int = HIDDEN):
    generator = torch.Generator().manual_seed(num_rows)
    hidden_ND = torch.randn(num_rows, hidden, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight_VD = (torch.randn(vocab, hidden, generator=generator) * 0.5).to(DEVICE, dtype).requires_grad_()
    target_N = torch.randint(0, vocab, (num_rows,), generator=generator).to(DEVICE)
    return hidden_ND, weight_VD, target_N


def outputs_and_gradients(function, hidden: Tensor, weight: Tensor, target: Tensor, **options):
    """(logprob, entropy, d hidden, d weight) of sum(cos(i) logprob_i) + 0.3 sum(sin(i) entropy_i) where that flows."""
    hidden, weight = (x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight))
    logprob, entropy = function(hidden, weight, target, **options)
    index = torch.arange(len(target), device=DEVICE).to(logprob.dtype)
    value = (index.cos() * logprob).sum()
    if entropy.requires_grad and options.get("entropy_grad", True):
        value = value + 0.3 * (index.sin() * entropy).sum()
    value.backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def reference64(
    hidden: Tensor, weight: Tensor, target: Tensor, *, entropy_grad: bool, temperature: float | Tensor = 1.0
):
    def definition(hidden: Tensor, weight: Tensor, target: Tensor):
        logprob, entropy = reference.linear_logprob(hidden, weight, target, temperature)
        return logprob, entropy if entropy_grad else entropy.detach()

    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    return outputs_and_gradients(definition, *wide, target)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def assert_same(got: tuple, wanted: tuple, bound: float) -> None:
    for name, a, b in zip(("logprob", "entropy", "d hidden", "d weight"), got, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None and a.numel():
            assert relative_error(a, b) < bound, (name, relative_error(a, b))


@pytest.mark.parametrize("num_rows", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("keep,entropy_grad", [("none", False), ("none", True), ("probs", False)])
def test_equals_the_definition(keep: str, entropy_grad: bool, num_rows: int, backend: str):
    inputs = make(num_rows)
    wanted = reference64(*inputs, entropy_grad=entropy_grad, temperature=0.7)
    options = {"temperature": 0.7, "keep": keep, "entropy_grad": entropy_grad, "backend": backend}
    for chunk_rows in (50, None):
        got = outputs_and_gradients(fused_linear_logprob, *inputs, chunk_rows=chunk_rows, **options)
        assert_same(got, wanted, 2e-6)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_sides(frozen: str, entropy_grad: bool, backend: str):
    hidden, weight, target = make(40)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    wanted = reference64(hidden, weight, target, entropy_grad=entropy_grad)
    got = outputs_and_gradients(
        fused_linear_logprob, hidden, weight, target, entropy_grad=entropy_grad, chunk_rows=16, backend=backend
    )
    assert_same(got, wanted, 2e-6)


@pytest.mark.parametrize("keep", ["none", "probs"])
def test_ignored_rows_and_per_row_temperature(keep: str, backend: str):
    hidden, weight, target = make(60)
    target[::3] = -100
    temperature = torch.rand(60, device=DEVICE) + 0.5
    wanted = reference64(hidden, weight, target, entropy_grad=False, temperature=temperature)
    got = outputs_and_gradients(
        fused_linear_logprob, hidden, weight, target, temperature=temperature, keep=keep, backend=backend, chunk_rows=25
    )
    assert_same(got, wanted, 2e-6)
    assert bool((got[2][::3] == 0).all()) and bool((got[0][::3] == 0).all())


@pytest.mark.parametrize("backend", ["plain", *BACKENDS])
@pytest.mark.parametrize("how", ["none", "probs", "frozen"])
def test_suppressed_ids_are_as_if_the_head_had_no_such_rows(how: str, backend: str):
    hidden, weight, target = make(60)
    suppressed = (0, 5, 6, len(weight) - 1)
    kept = torch.tensor([i for i in range(len(weight)) if i not in suppressed], device=DEVICE)
    target = kept[target % len(kept)]
    fewer = weight.detach()[kept].requires_grad_(how != "frozen")
    weight.requires_grad_(how != "frozen")
    entropy_grad = how == "none"
    wanted = reference64(hidden, fewer, torch.searchsorted(kept, target), entropy_grad=entropy_grad, temperature=0.7)
    options = {"temperature": 0.7, "suppressed_ids": suppressed}
    if backend == "plain":
        got = outputs_and_gradients(reference.linear_logprob, hidden, weight, target, **options)
        wanted = reference64(hidden, fewer, torch.searchsorted(kept, target), entropy_grad=True, temperature=0.7)
    else:
        options |= {"keep": "auto" if how == "frozen" else how, "entropy_grad": entropy_grad, "chunk_rows": 25}
        got = outputs_and_gradients(fused_linear_logprob, hidden, weight, target, backend=backend, **options)
    weight_grad = got[3]
    if weight_grad is not None:
        assert not weight_grad[list(suppressed)].any()
        weight_grad = weight_grad[kept]
    assert_same((*got[:3], weight_grad), wanted, 2e-6)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_rows_and_nothing_but_ignored_rows(num_rows: int, backend: str):
    hidden, weight, target = make(num_rows)
    target.fill_(-100)
    _, _, hidden_grad, weight_grad = outputs_and_gradients(
        fused_linear_logprob, hidden, weight, target, backend=backend
    )
    assert hidden_grad.shape == hidden.shape and not hidden_grad.any() and not weight_grad.any()


@pytest.mark.parametrize("keep", ["none", "probs"])
def test_bfloat16_is_as_close_as_torch(keep: str, backend: str):
    """Error against float64 of the same rounded inputs: at most 1.5 times that of dense bfloat16 torch with float32
    log-probs, and within the stated bounds. Triton's interpreter truncates to bfloat16: twice the rounding there."""
    inputs = make(256, torch.bfloat16, vocab=2000, hidden=128)
    wanted = reference64(*inputs, entropy_grad=False)
    dense = outputs_and_gradients(
        lambda h, w, t: (lambda a, b: (a, b.detach()))(*reference.linear_logprob(h, w, t)), *inputs
    )
    got = outputs_and_gradients(fused_linear_logprob, *inputs, keep=keep, backend=backend)
    assert float((got[0].double() - wanted[0]).abs().max()) < 1e-4
    assert got[2].dtype == got[3].dtype == torch.bfloat16
    slack = 2.0 if backend == "triton" and DEVICE == "cpu" else 1.0
    for a, b, c in zip(got[2:], dense[2:], wanted[2:], strict=True):
        error = relative_error(a, c)
        assert error < 4e-3 * slack, error
        assert error < 1.5 * slack * relative_error(b, c)


def test_bfloat16_logits_are_the_cheaper_choice(backend: str):
    inputs = make(64, torch.bfloat16, vocab=500, hidden=64)
    wanted = reference64(*inputs, entropy_grad=False)
    got = outputs_and_gradients(fused_linear_logprob, *inputs, logits_dtype=torch.bfloat16, backend=backend)
    largest_logit = float((inputs[0].double() @ inputs[1].double().T).detach().abs().max())
    assert float((got[0].double() - wanted[0]).abs().max()) < 2.0**-8 * largest_logit
    for a, b in zip(got[2:], wanted[2:], strict=True):
        assert relative_error(a, b) < 2.0**-6


@pytest.mark.parametrize("keep", ["none", "probs", "frozen"])
def test_gradcheck(keep: str):
    hidden, weight, target = make(7, torch.float64, vocab=11, hidden=5)
    target[2] = -100
    weight.requires_grad_(keep != "frozen")

    def function(hidden: Tensor, weight: Tensor):
        return fused_linear_logprob(
            hidden,
            weight,
            target,
            0.8,
            keep="none" if keep == "frozen" else keep,
            entropy_grad=keep == "none",
            chunk_rows=3,
        )

    assert torch.autograd.gradcheck(function, (hidden, weight), check_undefined_grad=keep == "none")


def test_log_probs_depend_on_neither_chunks_nor_grad_mode(backend: str):
    """A scoring pass without gradients equals the training pass to the bit: the on-policy ratio is exactly 1."""
    hidden, weight, target = make(130)
    whole, _ = fused_linear_logprob(hidden, weight, target, keep="none", backend=backend)
    with torch.no_grad():
        scored, _ = fused_linear_logprob(hidden, weight, target, backend=backend)
    probs, _ = fused_linear_logprob(hidden, weight, target, keep="probs", backend=backend)
    assert torch.equal(whole, scored) and torch.equal(whole, probs)
    again = outputs_and_gradients(fused_linear_logprob, hidden, weight, target, backend=backend)
    twice = outputs_and_gradients(fused_linear_logprob, hidden, weight, target, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(again, twice, strict=True))


@pytest.mark.parametrize("keep", ["none", "probs"])
def test_a_second_backward_gives_the_same_gradients(keep: str):
    hidden, weight, target = make(20)
    logprob, _ = fused_linear_logprob(hidden, weight, target, keep=keep)
    first = torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logprob.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_entropy_is_detached_unless_asked_for():
    hidden, weight, target = make(4)
    assert not fused_linear_logprob(hidden, weight, target)[1].requires_grad
    assert fused_linear_logprob(hidden, weight, target, entropy_grad=True)[1].requires_grad


def kept_shape(logprob_N: Tensor) -> tuple[int, ...]:
    """Of what forward left for backward beside its inputs and statistics."""
    node: Any = logprob_N.grad_fn
    return tuple(node.saved_tensors[5].shape)


def test_probabilities_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch):
    inputs = make(20)
    monkeypatch.setattr(linear_logprob, "KEEP_BYTES", 20 * VOCAB * 4)
    assert kept_shape(fused_linear_logprob(*inputs)[0]) == (20, VOCAB)
    assert kept_shape(fused_linear_logprob(*inputs, entropy_grad=True)[0]) == (0,)
    with torch.autograd.graph.save_on_cpu():  # they would be copied, or made twice by checkpointing
        assert kept_shape(fused_linear_logprob(*inputs)[0]) == (0,)
    monkeypatch.setattr(linear_logprob, "KEEP_BYTES", 20 * VOCAB * 4 - 1)
    assert kept_shape(fused_linear_logprob(*inputs)[0]) == (0,)
    assert kept_shape(fused_linear_logprob(*inputs, keep="probs")[0]) == (20, VOCAB)


def test_a_gpu_keeps_them_within_a_quarter_of_its_free_memory(monkeypatch: pytest.MonkeyPatch):
    """1,000 x 1,000 x 2 bytes; the driver has 5 MB free and torch another 3 MB: 2 MB may be taken."""
    hidden: Any = SimpleNamespace(shape=(1000, 64), is_cuda=True, device=None, element_size=lambda: 2)
    numbers = {"memory_reserved": 7e6, "memory_allocated": 4e6, "mem_get_info": (5e6, 9e9)}
    numbers["is_current_stream_capturing"] = False
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert can_keep(hidden, 1000) and not can_keep(hidden, 1001)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert can_keep(hidden, 1001)


def test_without_values_the_answer_does_not_depend_on_the_moment():
    """7,062 rows x 152,064 x 2 bytes are 2 GiB; no GPU is asked, as there is none."""
    with FakeTensorMode():
        assert can_keep(torch.empty(7061, 8, dtype=torch.bfloat16, device="cuda"), 152_064)
        assert not can_keep(torch.empty(7062, 8, dtype=torch.bfloat16, device="cuda"), 152_064)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_compiles_without_a_break_and_exports(entropy_grad: bool):
    inputs = make(20)

    def head(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return fused_linear_logprob(hidden, weight, target, 0.7, **options)

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    wanted = outputs_and_gradients(head, *inputs, entropy_grad=entropy_grad)
    assert_same(outputs_and_gradients(compiled, *inputs, entropy_grad=entropy_grad), wanted, 1e-7)

    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return head(hidden, weight, target)

    with torch.no_grad():
        rows = {0: torch.export.Dim.AUTO}
        exported = torch.export.export(Module(), inputs, dynamic_shapes=(rows, None, rows))
        assert torch.equal(exported.module()(*inputs)[0], wanted[0])


def test_strided_inputs():
    hidden, weight, target = make(20)
    wide = torch.cat([hidden.detach()] * 2, 1)[:, 3 : 3 + HIDDEN].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    wanted = reference64(wide, turned, target, entropy_grad=False)
    assert_same(outputs_and_gradients(fused_linear_logprob, wide, turned, target), wanted, 2e-6)


def test_autocast_does_not_round_float32_inputs():
    hidden, weight, target = make(10)
    plain, _ = fused_linear_logprob(hidden, weight, target)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside, _ = fused_linear_logprob(hidden, weight, target)
    assert torch.equal(plain, inside)


def test_ops_are_registered_right():
    hidden, weight, target = make(6)
    scale = torch.ones(6, device=DEVICE)
    op = torch.ops.vcr1_kernels.linear_logprob_forward
    for keep in ("none", "probs", "direction"):
        arguments = (hidden.detach(), weight.detach(), target, scale, keep, torch.float32, 4, False, [1, 2])
        torch.library.opcheck(op, arguments)
        stats, kept = op(*arguments)
        if keep != "direction":
            backward = (*arguments[:4], stats, kept, scale, None, keep, True, True, torch.float32, 4, False, [1, 2])
            torch.library.opcheck(torch.ops.vcr1_kernels.linear_logprob_backward, backward)


def test_chunks():
    assert row_chunks(0, 4) == []
    assert row_chunks(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert row_chunks(9, 4, (2, 3, 1, 3)) == [(0, 2), (2, 6), (6, 9)]
    assert row_chunks(9, 4, (0, 6, 0, 2, 1)) == [(0, 6), (6, 9)]  # longer than a chunk: one of its own


def test_chunks_are_as_even_as_the_tiles_allow():
    """At the sizes of the 3B and 7B heads: tiles of 128 x 256 over 132 multiprocessors, 4,096 rows at most."""
    head_3b, head_7b = (2048, 151_936, 6), (3584, 152_064, 6)
    assert [num_waves(rows, 3584) for rows in (512, 2048, 3584, 4096)] == [1, 2, 3, 4]  # 56, 224, 392, 448 tiles
    assert largest_chunk(*head_3b[1:]) == largest_chunk(*head_7b[1:]) == 4096
    # one chunk and pass over dW; 3,584 + 512 would be 4 waves as well, and two passes
    assert auto_chunk_rows(4096, *head_7b) == 4096
    assert auto_chunk_rows(4500, *head_7b) == 2304  # 18 x 14 tiles, 2 waves, twice
    # four chunks of 4 waves are 16, five of 3 waves 15: a wave is more than a fifth pass of 0.83 waves
    assert auto_chunk_rows(16_384, *head_7b) == 3328
    assert auto_chunk_rows(16_384, *head_3b) == 4096
    assert auto_chunk_rows(0, *head_7b) == auto_chunk_rows(1, *head_7b) == 128
    for num_rows in range(1, 20_000, 397):
        rows = auto_chunk_rows(num_rows, *head_7b)
        assert rows % 128 == 0 and rows <= 4096


@pytest.mark.gpu
@pytest.mark.parametrize("hidden,vocab", [(2048, 151_936), (3584, 152_064)])
@pytest.mark.parametrize("keep", ["none", "probs"])
def test_real_heads_in_bfloat16(keep: str, hidden: int, vocab: int):
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden_ND = torch.randn(512, hidden, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(hidden**-0.5)
    weight_VD.requires_grad_()
    target_N = torch.randint(0, vocab, (512,), generator=generator, device="cuda")
    wanted = reference64(hidden_ND, weight_VD, target_N, entropy_grad=False)
    got = outputs_and_gradients(fused_linear_logprob, hidden_ND, weight_VD, target_N, keep=keep, chunk_rows=256)
    assert float((got[0].double() - wanted[0]).abs().max()) < 1e-4
    assert float((got[1].double() - wanted[1]).abs().max()) < 1e-3
    for a, b in zip(got[2:], wanted[2:], strict=True):
        assert relative_error(a, b) < 4e-3
