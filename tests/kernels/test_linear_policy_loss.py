"""fused_linear_policy_loss and policy_loss against the dense definition: every variant, chunking, dropped rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from vcr1_kernels import (
    PolicyLoss,
    PrefixGroup,
    TokenVectors,
    fused_linear_logprob,
    fused_linear_policy_loss,
    logprob_of_logits,
    patchify,
    policy_loss,
    prefix_attention,
    reference,
)
from vcr1_kernels.head_chunks import Head, scale_unless_one_
from vcr1_kernels.losses import LossFunction
from vcr1_kernels.policy_visit import plan_pieces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
LENS = (7, 1, 12, 0, 5, 9)
NUM_ROWS, HIDDEN, VOCAB = sum(LENS), 16, 150
LOSSES = {
    "grpo": PolicyLoss(beta=0.1),
    "grpo no kl": PolicyLoss(),
    "dapo entropy": PolicyLoss("dapo", clip_high=0.28, entropy_coef=0.01),
    "gspo": PolicyLoss("gspo", clip_low=0.03, clip_high=0.04),
    "cispo": PolicyLoss("cispo", dialect="trl", clip_high=5.0),
    "sapo": PolicyLoss("sapo"),
    "verl": PolicyLoss(dialect="verl", beta=0.05, sampling_correction="token_truncate", sampling_cap=1.1),
    "sequence mask": PolicyLoss(dialect="trl", sampling_correction="sequence_mask", sampling_cap=2.0),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(dtype: torch.dtype = torch.float32, zero_sequences: tuple[int, ...] = (), on_policy: bool = False):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_ROWS, HIDDEN, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight_VD = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.4).to(DEVICE, dtype).requires_grad_()
    target_N = torch.randint(0, VOCAB, (NUM_ROWS,), generator=generator).to(DEVICE)
    with torch.no_grad():
        logprob_N = reference.linear_logprob(hidden_ND.double(), weight_VD.double(), target_N, 0.9)[0].cpu()
    noise = 0.3 * torch.randn(3, NUM_ROWS, generator=generator, dtype=torch.float64)
    advantage_S = torch.randn(len(LENS), generator=generator, dtype=torch.float64)
    advantage_S[list(zero_sequences)] = 0.0
    tokens = TokenVectors(
        advantage_N=advantage_S.repeat_interleave(torch.tensor(LENS)),
        weight_N=torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64) / NUM_ROWS,
        old_logprob_N=None if on_policy else logprob_N + noise[0],
        ref_logprob_N=logprob_N + noise[1],
        sampling_logprob_N=logprob_N + noise[2],
        sequence_lens=LENS,
    )
    return hidden_ND, weight_VD, target_N, tokens


def cast(tokens: TokenVectors, dtype: torch.dtype) -> TokenVectors:
    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE, dtype)

    return TokenVectors(
        tokens.advantage_N.to(DEVICE, dtype), tokens.weight_N.to(DEVICE, dtype), to(tokens.old_logprob_N),
        to(tokens.ref_logprob_N), to(tokens.sampling_logprob_N), sequence_lens=tokens.sequence_lens,
    )  # fmt: skip


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def definition(hidden: Tensor, weight: Tensor, target: Tensor, loss: LossFunction, tokens: TokenVectors):
    """(loss, sums, d hidden, d weight) in float64, by autograd through dense logits."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    value, sums = reference.linear_policy_loss(*wide, target, loss, cast(tokens, torch.float64), 0.9)
    value.backward()
    return value.detach(), sums, wide[0].grad, wide[1].grad


def assert_equals_definition(inputs: tuple, loss: LossFunction, bound: float = 1e-5, **options: object) -> None:
    hidden, weight, target, tokens = inputs
    value, sums, hidden_grad, weight_grad = definition(hidden, weight, target, loss, tokens)
    hidden.grad = weight.grad = None
    got, got_sums = fused_linear_policy_loss(hidden, weight, target, loss, cast(tokens, torch.float32), 0.9, **options)
    got.backward()
    scale = max(float(tokens.weight_N.abs().sum()), abs(float(value)))
    assert abs(float(got.detach()) - float(value)) < bound * scale
    assert set(got_sums) == set(sums)
    for name, number in sums.items():
        assert float(got_sums[name]) == pytest.approx(float(number), rel=1e-4, abs=1e-4), name
    for a, b in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert relative_error(a, b) < bound, relative_error(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_definition(name: str, backend: str):
    for chunk_rows in (8, None):
        assert_equals_definition(make(), LOSSES[name], chunk_rows=chunk_rows, backend=backend)


def test_suppressed_ids_are_as_if_the_head_had_no_such_rows(backend: str):
    hidden, weight, target, tokens = make()
    suppressed = (1, 2, 40)
    kept = torch.tensor([i for i in range(VOCAB) if i not in suppressed], device=DEVICE)
    target, fewer = kept[target % len(kept)], weight.detach()[kept].requires_grad_()
    inputs = (hidden, fewer, torch.searchsorted(kept, target), LOSSES["dapo entropy"], tokens)
    value, sums, hidden_grad, weight_grad = definition(*inputs)
    options = {"chunk_rows": 8, "backend": backend, "suppressed_ids": suppressed}
    given = (LOSSES["dapo entropy"], cast(tokens, torch.float32), 0.9)
    got, got_sums = fused_linear_policy_loss(hidden, weight, target, *given, **options)
    got.backward()
    assert float(got.detach()) == pytest.approx(float(value), rel=1e-5)
    assert {n: float(x) for n, x in got_sums.items()} == pytest.approx({n: float(x) for n, x in sums.items()}, rel=1e-4)
    assert relative_error(hidden.grad, hidden_grad) < 1e-5
    assert relative_error(weight.grad[kept], weight_grad) < 1e-5 and not weight.grad[list(suppressed)].any()


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_ratio_is_one_and_the_gradient_whole(name: str):
    assert_equals_definition(make(on_policy=True), LOSSES[name], chunk_rows=10)


@pytest.mark.parametrize("name", ["grpo no kl", "gspo", "grpo", "dapo entropy"])
@pytest.mark.parametrize("zero", [(0, 2), (0, 1, 2, 3, 4, 5)])
def test_rows_without_coefficient_are_scored_but_not_trained(zero: tuple[int, ...], name: str, backend: str):
    """Loss, gradients and all sums stay those of the definition, which drops nothing."""
    assert_equals_definition(make(zero_sequences=zero), LOSSES[name], chunk_rows=8, backend=backend)


def test_plan_of_dropped_rows():
    hidden, weight, target, tokens = make(zero_sequences=(0, 2))
    head = Head(hidden, weight, target, torch.ones(NUM_ROWS), torch.float32, False)
    plan = plan_pieces(PolicyLoss(), tokens, head, 8)
    # 15 live rows (1 + 5 + 9), then the 19 of sequences 0 and 2
    assert plan.pieces == [(0, 8, True), (8, 15, True), (15, 23, False), (23, 31, False), (31, 34, False)]
    assert plan.order_N is not None and plan.sequence_lens is None
    assert plan.order_N.tolist() == [7, *range(20, 34), *range(7), *range(8, 20)]
    plan = plan_pieces(PolicyLoss("gspo"), tokens, head, 8)
    # whole sequences: 1 + 5, 9, then 7 and 12; that without a token goes with the idle ones
    assert plan.sequence_lens == (1, 5, 9, 7, 12, 0)
    assert plan.pieces == [(0, 6, True), (6, 15, True), (15, 22, False), (22, 34, False)]
    plan = plan_pieces(PolicyLoss(beta=0.1), tokens, head, 8)  # with a KL every row has a coefficient
    assert plan.order_N is None and [p.needs_gradient for p in plan.pieces] == [True] * 5


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_sides(frozen: str):
    inputs = make()
    inputs[frozen == "weight"].requires_grad_(False)
    assert_equals_definition(inputs, LOSSES["grpo"], chunk_rows=10)


def test_bfloat16_is_within_the_stated_bound(backend: str):
    """4e-3 from float64 on the same rounded inputs; the interpreter truncates to bfloat16: twice the rounding."""
    slack = 2.0 if backend == "triton" and DEVICE == "cpu" else 1.0
    hidden, weight, target, tokens = make(torch.bfloat16)
    for name in ("grpo", "dapo entropy"):
        _, _, hidden_grad, weight_grad = definition(hidden, weight, target, LOSSES[name], tokens)
        hidden.grad = weight.grad = None
        loss, _ = fused_linear_policy_loss(
            hidden, weight, target, LOSSES[name], cast(tokens, torch.float32), 0.9, chunk_rows=8, backend=backend
        )
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        assert relative_error(hidden.grad, hidden_grad) < 4e-3 * slack
        assert relative_error(weight.grad, weight_grad) < 4e-3 * slack


def test_any_function_of_the_user():
    """Also one that sends gradient through the entropy only, or through nothing."""

    def cubic(logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, dict[str, Tensor]]:
        value = (tokens.weight_N * (logprob_N**3 + entropy_N.square())).sum()
        return value, {"largest": (tokens.weight_N * logprob_N).sum()}

    def entropy_only(logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, dict[str, Tensor]]:
        return (tokens.weight_N * entropy_N).sum(), {}

    assert_equals_definition(make(), cubic, chunk_rows=8)
    assert_equals_definition(make(), entropy_only, chunk_rows=8)

    hidden, weight, target, tokens = make()
    loss, sums = fused_linear_policy_loss(hidden, weight, target, lambda *_: (torch.zeros(()), {}), tokens)
    loss.backward()
    assert sums == {} and hidden.grad is not None and not hidden.grad.any()


def test_upstream_factor_and_second_backward():
    hidden, weight, target, tokens = make()
    tokens = cast(tokens, torch.float32)
    loss, _ = fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss, _ = fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens)
    thrice = torch.autograd.grad(3.0 * loss, (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3.0 * a, b)


def test_without_gradients_nothing_is_kept():
    hidden, weight, target, tokens = make()
    tokens = cast(tokens, torch.float32)
    trained, sums = fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens, chunk_rows=8)
    with torch.no_grad():
        scored, scored_sums = fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens, chunk_rows=8)
    assert not scored.requires_grad and torch.equal(scored, trained.detach())
    assert {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in scored_sums.items()}


def test_no_rows():
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.zeros(VOCAB, HIDDEN, requires_grad=True)
    tokens = TokenVectors(torch.zeros(0), torch.zeros(0), sequence_lens=())
    for loss in (PolicyLoss(), PolicyLoss("gspo")):
        value, sums = fused_linear_policy_loss(hidden, weight, torch.zeros(0, dtype=torch.long), loss, tokens)
        value.backward()
        assert float(value) == 0 and float(sums["tokens"]) == 0
    assert weight.grad is not None and not weight.grad.any()


def test_a_loss_derived_from_ours_keeps_its_own_rule_when_compiled():
    hidden, weight, target, tokens = make()
    tokens = cast(tokens, torch.float32)

    @dataclass(frozen=True)
    class Tenfold(PolicyLoss):
        kept: Tensor = field(default_factory=lambda: torch.ones(1), compare=False)  # not to be written as JSON

        def __call__(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, sums = super().__call__(*arguments)
            return 10.0 * value, sums

    def step(hidden: Tensor, loss: PolicyLoss) -> Tensor:
        return fused_linear_policy_loss(hidden, weight, target, loss, tokens)[0]

    wanted = 10.0 * step(hidden, PolicyLoss())
    for function in (step, torch.compile(step, backend="eager")):
        torch.testing.assert_close(function(hidden, Tenfold()), wanted)


def value_sums_and_gradients(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, *inputs: Any
) -> tuple[Tensor, dict[str, float], list[Tensor | None]]:
    hidden.grad = weight.grad = None
    value, sums = function(hidden, weight, *inputs)
    (3.0 * value).backward()
    return value.detach(), {name: float(x) for name, x in sums.items()}, [hidden.grad, weight.grad]


@pytest.mark.parametrize(
    "name,compiler",
    [
        ("grpo no kl", "aot_eager"),  # rows without a coefficient
        ("dapo entropy", "aot_eager"),
        ("sequence mask", "aot_eager"),
        pytest.param("gspo", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_break(name: str, compiler: str):
    torch._dynamo.reset()
    hidden, weight, target, tokens = make(zero_sequences=(0, 2))

    def step(hidden: Tensor, weight: Tensor, tokens: TokenVectors) -> tuple[Tensor, dict[str, Tensor]]:
        return fused_linear_policy_loss(hidden * 2.0, weight, target, LOSSES[name], tokens, 0.9, chunk_rows=8)

    inputs = hidden, weight, cast(tokens, torch.float32)
    wanted = value_sums_and_gradients(step, *inputs)
    got = value_sums_and_gradients(torch.compile(step, fullgraph=True, backend=compiler), *inputs)
    assert torch.equal(got[0], wanted[0]) and list(got[1]) == list(wanted[1])
    assert got[1] == pytest.approx(wanted[1], rel=1e-6)  # counts are float32 here
    for a, b in zip(got[2], wanted[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_exports_as_one_operator_and_compiles_with_a_frozen_weight():
    hidden, weight, target, tokens = make()
    tokens, loss = cast(tokens, torch.float32), PolicyLoss("gspo", clip_high=0.28)
    weight.requires_grad_(False)

    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, advantage_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            changed = replace(tokens, advantage_N=advantage_N)
            return fused_linear_policy_loss(hidden, weight, target, loss, changed, 0.9)

    wanted = Module()(hidden, tokens.advantage_N)
    exported = torch.export.export(Module(), (hidden, tokens.advantage_N))
    names = {str(node.target) for node in exported.graph.nodes}
    assert "vcr1_kernels.linear_policy_loss.default" in names and "aten.mm.default" not in names
    got = exported.module()(hidden, tokens.advantage_N)
    assert torch.equal(got[0], wanted[0]) and float(got[1]["entropy"]) == pytest.approx(float(wanted[1]["entropy"]))
    got = torch.compile(Module(), fullgraph=True, backend="aot_eager")(hidden, tokens.advantage_N)
    torch.testing.assert_close(torch.autograd.grad(got[0], hidden), torch.autograd.grad(wanted[0], hidden))


@pytest.mark.parametrize("loss", [*LOSSES.values(), PolicyLoss(dialect="verl", dual_clip=float("inf"))])
def test_what_a_compiled_graph_is_told_of_a_loss(loss: PolicyLoss):
    *_, tokens = make()
    logprob_N = torch.zeros(NUM_ROWS, dtype=torch.float64)
    for given in (tokens, replace(tokens, sampling_logprob_N=None)):
        if given is tokens or loss.sampling_correction == "none":
            assert list(loss(logprob_N, logprob_N, given)[1]) == loss.sum_names(given)
    assert PolicyLoss.from_settings(loss.settings) == loss
    assert PolicyLoss(clip_low=0.1).settings != PolicyLoss().settings
    assert PolicyLoss(clip_low=np.float32(0.5)).settings == PolicyLoss(clip_low=0.5).settings


def test_the_operators_are_registered_right():
    hidden, weight, target, tokens = make()
    tokens = cast(tokens, torch.float32)
    vectors, scale = [tokens.advantage_N, tokens.weight_N], torch.ones(NUM_ROWS, device=DEVICE)
    for loss, lens in ((PolicyLoss(), None), (PolicyLoss("gspo"), list(LENS))):
        arguments = (hidden.detach(), weight.detach(), target, scale, vectors, "advantage_N weight_N", lens)
        options = (loss.settings, 6, [1, 2], torch.float32, 8, False, True, True)
        torch.library.opcheck(torch.ops.vcr1_kernels.linear_policy_loss, (*arguments, *options))
    torch.library.opcheck(torch.ops.vcr1_kernels.scale_unless_one, (torch.ones(5), torch.tensor(2.0)))


def test_on_fake_tensors_no_kernel_is_launched(monkeypatch: pytest.MonkeyPatch):
    """A launch outside of an operator would run there, on memory that does not exist."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    options: dict[str, Any] = {"backend": "triton"}
    with FakeTensorMode():
        hidden, weight, logits = (torch.empty(6, n, requires_grad=True) for n in (16, 16, 6))
        target = torch.zeros(6, dtype=torch.long)
        tokens = TokenVectors(torch.empty(6), torch.empty(6), sequence_lens=(2, 4))
        loss, _ = fused_linear_policy_loss(hidden, weight, target, PolicyLoss("gspo"), tokens, **options)
        loss.backward()
        for values in fused_linear_logprob(hidden, weight, target, entropy_grad=True, **options):
            values.sum().backward(retain_graph=True)
        policy_loss(logits * 1.0, target, PolicyLoss("dapo", entropy_coef=0.1), tokens, **options)[0].backward()
        scale_unless_one_(torch.empty(5), torch.ones(()))
        assert patchify(torch.empty(2, 28, 28, 3, dtype=torch.uint8), **options).shape == (4, 1176)
        query, key = torch.empty(9, 4, 64, requires_grad=True), torch.empty(9, 2, 64)
        prefix_attention(query, key, key, (PrefixGroup(0, 5, (4,)),), 0.1, **options).sum().backward()
    assert all(isinstance(x.grad, FakeTensor) for x in (hidden, weight, logits, query))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_level_equals_the_definition(name: str, inplace: bool, backend: str):
    hidden, weight, target, tokens = make()
    leaf = (hidden.detach() @ weight.detach().T).double().requires_grad_()
    wanted, wanted_sums = reference.policy_loss(leaf, target, LOSSES[name], cast(tokens, torch.float64), 0.9)
    wanted.backward()
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    loss, sums = policy_loss(
        logits * 1.0, target, LOSSES[name], cast(tokens, torch.float32), 0.9, inplace=inplace, backend=backend
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5 * float(tokens.weight_N.sum()))
    assert logits.grad is not None and leaf.grad is not None
    assert relative_error(logits.grad, leaf.grad) < 1e-5
    assert float(sums["kl"]) == pytest.approx(float(wanted_sums["kl"]), rel=1e-4, abs=1e-4)


def test_logits_in_place_reuses_their_memory(backend: str):
    logits = torch.randn(4, 30, device=DEVICE, requires_grad=True)
    middle = logits * 2.0
    logprob, _ = logprob_of_logits(middle, torch.tensor([1, 2, 3, -100], device=DEVICE), backend=backend)
    before = middle.detach().clone()
    logprob.sum().backward(retain_graph=True)
    assert not torch.equal(middle.detach(), before)
    torch.testing.assert_close(logits.grad, 2.0 * middle.detach())
    with pytest.raises(RuntimeError, match="second backward through policy_loss"):
        logprob.sum().backward()


def test_whole_logits_of_a_batch_without_a_copy():
    """[B, L + 1, V] with -100 at the last position of each row, as a trainer that shifts labels would pass them."""
    logits = torch.randn(2, 5, 40, device=DEVICE)
    target = torch.randint(0, 40, (2, 5), device=DEVICE)
    target[:, -1] = -100
    logprob, entropy = logprob_of_logits(logits, target, 0.7)
    wanted, _ = reference.logprob_of_logits(logits[:, :-1].reshape(-1, 40), target[:, :-1].reshape(-1), 0.7)
    torch.testing.assert_close(logprob[:, :-1].reshape(-1), wanted)
    assert logprob.shape == entropy.shape == (2, 5) and not logprob[:, -1].any()
    with pytest.raises(ValueError, match="pass the whole logits"):
        logprob_of_logits(logits[:, :-1], target[:, :-1])


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size,vocab", [(2048, 151_936), (3584, 152_064)])
def test_real_heads_in_bfloat16(hidden_size: int, vocab: int):
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(600, hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = weight.mul_(hidden_size**-0.5).requires_grad_()
    target = torch.randint(0, vocab, (600,), generator=generator, device="cuda")
    advantage = torch.randn(600, generator=generator, device="cuda")
    tokens = TokenVectors(advantage, torch.full((600,), 1 / 600, device="cuda"))
    _, _, hidden_grad, weight_grad = definition(hidden, weight, target, PolicyLoss(), tokens)
    loss, _ = fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens, 0.9, chunk_rows=256)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(hidden.grad, hidden_grad) < 4e-3
    assert relative_error(weight.grad, weight_grad) < 4e-3
    del hidden_grad, weight_grad, loss
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens, chunk_rows=256)[0].backward()
    chunk_bytes = 256 * vocab * (4 + 2)
    weight_bytes = 4 * weight.numel()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.15 * (chunk_bytes + weight_bytes) + 2 * weight.numel()  # + the gradient cast to bfloat16
