"""What the losses and the fused heads copy to the device and wait for, counted on `meta` tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import PolicyLoss, TokenVectors, fused_linear_logprob, fused_linear_policy_loss
from vcr1_kernels.device import prefix_attention, prefix_attention_backward
from vcr1_kernels.loss_weights import trl_weights
from vcr1_kernels.prefix_attention_flash import FlashAttention, make_plan
from vcr1_kernels.prefix_attention_triton import TritonAttention, _tables
from vcr1_kernels.prefix_layout import PrefixGroup, PrefixLayout
from vcr1_kernels.upload import upload_ints

from tests.kernels.device_traffic import DEVICE, watched

LENS = (7, 1, 12, 0, 5, 9)
NUM_ROWS, HIDDEN, VOCAB = sum(LENS), 16, 150
TERMS = {"beta": 0.1, "entropy_coef": 0.01}
BOUNDS = {"sampling_floor": 0.5, "sampling_cap": 2.0}
# Every formula of the package once: variants by dialect, KL gradients, and each rollout correction
LOSSES = {
    **{f"paper {v}": PolicyLoss(v, **TERMS) for v in ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo")},
    **{f"trl {v}": PolicyLoss(v, "trl", **TERMS) for v in ("grpo", "gspo", "cispo", "sapo")},
    **{f"verl {v}": PolicyLoss(v, "verl", **TERMS) for v in ("grpo", "gspo", "cispo", "sapo")},
    **{f"openrlhf {v}": PolicyLoss(v, "openrlhf", kl_gradient="k2", **TERMS) for v in ("grpo", "gspo")},
    "trl dual clip": PolicyLoss("grpo", "trl", dual_clip=4.0),
    **{
        f"correction {mode}": PolicyLoss(sampling_correction=mode, **BOUNDS)
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    **{
        f"openrlhf gate {gate}": PolicyLoss(
            dialect="openrlhf", sampling_correction="sequence_mask", sampling_gate=gate, sampling_cap=2.0
        )
        for gate in ("ratio", "binary_kl", "tv")
    },
}


def make_tokens(device: torch.device, idle_sequences: tuple[int, ...] = ()) -> TokenVectors:
    advantage_S = torch.linspace(-1.0, 1.2, len(LENS))
    advantage_S[list(idle_sequences)] = 0.0
    advantage_N = advantage_S.repeat_interleave(torch.tensor(LENS)).to(device)
    others = [torch.full((NUM_ROWS,), value).to(device) for value in (1.0, -1.1, -1.2, -1.0)]
    return TokenVectors(advantage_N, *others, sequence_lens=LENS)


def make_head() -> tuple[Tensor, Tensor, Tensor]:
    hidden_ND = torch.empty(NUM_ROWS, HIDDEN, device=DEVICE, requires_grad=True)
    weight_VD = torch.empty(VOCAB, HIDDEN, device=DEVICE, requires_grad=True)
    return hidden_ND, weight_VD, torch.empty(NUM_ROWS, device=DEVICE, dtype=torch.long)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_on_the_device_sends_the_lengths_at_most_and_waits_for_nothing(name: str):
    loss, tokens = LOSSES[name], make_tokens(DEVICE)
    logprob_N, entropy_N = (torch.empty(NUM_ROWS, device=DEVICE, requires_grad=True) for _ in range(2))
    with watched() as traffic:
        value, _ = loss(logprob_N, entropy_N, tokens)
        torch.autograd.grad(value, (logprob_N, entropy_N), allow_unused=True)
    assert (len(traffic.copies), traffic.blocking, traffic.waits) == (int(loss.is_sequence_level), [], [])


@pytest.mark.parametrize("idle_sequences", [(), (0, 2)], ids=["all rows live", "idle rows"])
@pytest.mark.parametrize("name", LOSSES)
def test_copies_of_the_fused_loss_do_not_depend_on_its_chunks(name: str, idle_sequences: tuple[int, ...]):
    loss, tokens = LOSSES[name], make_tokens(torch.device("cpu"), idle_sequences)
    has_idle_rows = bool(loss.zero_rows(tokens).any())
    assert has_idle_rows == (idle_sequences != () and not loss.beta)
    for chunk_rows in (8, NUM_ROWS):
        hidden, weight, target = make_head()
        with watched() as traffic:
            value, _ = fused_linear_policy_loss(hidden, weight, target, loss, tokens, 0.9, chunk_rows=chunk_rows)
            value.backward()
        # five vectors, the lengths where the loss needs them, the order of the rows where some have no coefficient
        assert len(traffic.copies) == 5 + loss.is_sequence_level + has_idle_rows
        assert (traffic.blocking, traffic.waits) == ([], [])


def test_vectors_on_the_device_are_waited_for_once():
    tokens = make_tokens(DEVICE)
    for chunk_rows in (8, NUM_ROWS):
        with watched() as traffic:
            fused_linear_policy_loss(*make_head(), PolicyLoss(), tokens, 0.9, chunk_rows=chunk_rows)[0].backward()
        assert (traffic.copies, traffic.waits) == ([], ["_to_copy"])


@pytest.mark.parametrize("keep", ["none", "probs"])
def test_the_logprob_head_sends_the_temperatures_only(keep: str):
    for chunk_rows in (8, NUM_ROWS):
        hidden, weight, target = make_head()
        with watched() as traffic:
            logprob, _entropy = fused_linear_logprob(
                hidden, weight, target, torch.full((NUM_ROWS,), 0.9), keep=keep, chunk_rows=chunk_rows
            )
            logprob.sum().backward()
        assert (len(traffic.copies), traffic.blocking, traffic.waits) == (1, [], [])


def test_weights_of_lengths_on_the_device_send_no_total():
    lengths_S = torch.empty(4, dtype=torch.long, device=DEVICE)
    with watched() as traffic:
        trl_weights(lengths_S, "dapo", max_completion_length=8, num_items_in_batch=96.0)
    assert (traffic.copies, traffic.waits) == ([], [])


LAYOUTS = {
    "one group": (PrefixGroup(0, 5, (3, 0, 4)),),
    "three groups": (PrefixGroup(0, 6, (2, 5)), PrefixGroup(13, 4, ()), PrefixGroup(17, 1, (4, 1))),
}
NUM_LAYERS = 4


class EmptyFlash:
    """Flash attention of no values."""

    name = "empty"

    def forward(self, query_THC: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query_THC), query_THC.new_empty(query_THC.shape[1], query_THC.shape[0])

    def backward(self, grad_THC: Tensor, tensors: tuple[Tensor, ...], *_rest: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in tensors[:3])


class EmptyKernel:
    """A Triton kernel that is launched on any grid and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert min(grid) > 0
        return lambda *_arguments, **_options: None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["flash", "triton"])
def test_all_layers_read_tables_that_were_sent_once(monkeypatch: pytest.MonkeyPatch, name: str, layout: PrefixLayout):
    for module in (prefix_attention, prefix_attention_backward):
        for kernel in (k for k in vars(module) if k.startswith("prefix_") and k.endswith("_kernel")):
            monkeypatch.setattr(module, kernel, EmptyKernel())
    make_plan.cache_clear()
    _tables.cache_clear()
    attention: Any = FlashAttention(EmptyFlash()) if name == "flash" else TritonAttention()
    query, key, value, grad = (torch.empty(layout[-1].end, n, 64, device=DEVICE) for n in (4, 2, 2, 4))
    with watched() as traffic:
        for _ in range(NUM_LAYERS):
            attention.forward(query, key, value, layout, 0.1)
        for _ in range(NUM_LAYERS):  # as with checkpointing: forward once more, then backward
            out, lse = attention.forward(query, key, value, layout, 0.1)
            attention.backward(grad, (query, key, value, out, lse), layout, 0.1)
    assert (len(traffic.copies), traffic.blocking, traffic.waits) == (1, [], [])


def test_tables_sent_together_begin_at_16_bytes():
    tables = ([1, 2, 3, 4, 5], [], [6], [7, 8, 9, 10])
    sent = upload_ints(tables, torch.device("cpu"))
    assert [x.tolist() for x in sent] == [list(table) for table in tables]
    assert [x.storage_offset() for x in sent] == [0, 8, 8, 12]
    assert {x.dtype for x in sent} == {torch.int32}
