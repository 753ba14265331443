"""What a caller gets wrong is named: what, what was given, what is wanted. Each public entry point of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vcr1_kernels import (
    PolicyLoss,
    PrefixGroup,
    TokenVectors,
    attention_backend,
    fused_linear_logprob,
    fused_linear_policy_loss,
    logprob_of_logits,
    patchify,
    policy_loss,
    prefix_attention,
    rotary,
)

HIDDEN, WEIGHT, LOGITS = torch.ones(3, 8), torch.ones(11, 8), torch.ones(3, 11)
TARGET, BEYOND = torch.tensor([1, 2, 3]), torch.tensor([1, 11, -100])
TOKENS = TokenVectors(torch.ones(3), torch.ones(3))
FEWER = TokenVectors(torch.ones(1), torch.ones(1))  # would be broadcast
NO_CLASS = r"target 11 is not in a vocabulary of 11: wanted 0 to 10, or -100"
BY_NAME = r"loss is 'grpo', wanted PolicyLoss\('grpo'\), or a function"
UNKNOWN = r"loss is 'ppo', wanted PolicyLoss of one of grpo, dr_grpo, bnpo, dapo, gspo, cispo, sapo, or a function"
Case = tuple[dict[str, Any], type[Exception], str]

HEAD: list[Case] = [
    ({"target_N": BEYOND}, IndexError, NO_CLASS),
    ({"hidden_ND": None}, TypeError, "hidden of type NoneType, wanted a torch.Tensor"),
    ({"target_N": [1, 2, 3]}, TypeError, "target of type list"),
    ({"target_N": TARGET.bool()}, TypeError, r"target is torch\.bool, wanted int32 or int64"),
    ({"hidden_ND": HIDDEN[None]}, ValueError, r"hidden \(1, 3, 8\), weight \(11, 8\).* wanted \[N, D\], \[V, D\]"),
    ({"hidden_ND": HIDDEN[:, :4]}, ValueError, r"hidden \(3, 4\), weight \(11, 8\)"),
    ({"target_N": TARGET[:2]}, ValueError, "one target per row"),
    ({"hidden_ND": HIDDEN.half(), "weight_VD": WEIGHT.half()}, TypeError, r"torch\.float16.*float16 cannot hold"),
    ({"weight_VD": WEIGHT.bfloat16()}, TypeError, r"hidden torch\.float32 and weight torch\.bfloat16"),
    ({"weight_VD": WEIGHT.to("meta")}, ValueError, "hidden on cpu, weight on meta, target on cpu, wanted one device"),
    ({"weight_VD": WEIGHT[:0]}, ValueError, r"weight \(0, 8\).* wanted V >= 1 and D >= 1"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows is 0, wanted an int >= 1"),
    ({"chunk_rows": -1}, ValueError, "chunk_rows is -1, wanted an int >= 1"),
    ({"chunk_rows": 1.5}, ValueError, r"chunk_rows is 1\.5, wanted an int >= 1"),
    ({"temperature": "1"}, ValueError, "temperature is '1', wanted a finite number > 0"),
    ({"temperature": 0.0}, ValueError, r"temperature is 0\.0, wanted a finite number > 0"),
    ({"temperature": torch.ones(4)}, ValueError, r"temperature has shape \(4,\)"),
    ({"backend": "cuda"}, ValueError, "wanted auto, torch or triton"),
    ({"logits_dtype": torch.float16}, TypeError, r"logits_dtype is torch\.float16"),
    ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "a temperature of the rows is not a finite number"),
]
LOSS: list[Case] = [
    ({"loss": "grpo"}, TypeError, BY_NAME),
    ({"loss": "ppo"}, TypeError, UNKNOWN),
    ({"tokens": torch.ones(3)}, TypeError, "tokens are of type Tensor, wanted a TokenVectors"),
    ({"tokens": FEWER}, ValueError, r"tokens hold \(1,\) advantages, wanted \[3\], one per row"),
    ({"loss": lambda *_: torch.tensor(0.0)}, TypeError, r"returned Tensor, wanted \(scalar tensor, dict of tensors\)"),
    ({"loss": lambda *_: (1.0, {})}, TypeError, r"returned \(float, dict\), wanted \(scalar tensor"),
    ({"loss": lambda logprob, *_: (logprob, {})}, ValueError, r"a loss of shape \(3,\), wanted a scalar"),
    ({"loss": lambda logprob, *_: (logprob.sum(), {"n": 1})}, TypeError, "returned 'n' of type int, wanted a tensor"),
]
LOGIT: list[Case] = [
    ({"target_N": BEYOND}, IndexError, NO_CLASS),
    ({"target_N": TARGET.float()}, TypeError, r"target is torch\.float32, wanted int32 or int64"),
    ({"target_N": TARGET.to("meta")}, ValueError, "logits on cpu, target on meta, wanted one device"),
    ({"target_N": TARGET[:2]}, ValueError, r"logits have shape \(3, 11\), so target needs \(3,\), but it has \(2,\)"),
    ({"logits_NV": None}, TypeError, "logits of type NoneType"),
    ({"logits_NV": LOGITS.long()}, TypeError, r"logits are torch\.int64, wanted bfloat16"),
    ({"logits_NV": LOGITS[:, :0]}, ValueError, r"logits have shape \(3, 0\), wanted \[..., V\] with V >= 1"),
]
ATTENTION: list[Case] = [
    ({"query_THC": [1]}, TypeError, "query of type list"),
    ({"query_THC": torch.ones(1, 6, 2, 8)}, ValueError, r"query \(1, 6, 2, 8\).* wanted \[T, H, C\]"),
    ({"value_TKC": torch.ones(6, 1, 8).long()}, TypeError, r"torch\.int64\], wanted bfloat16"),
    ({"key_TKC": torch.ones(6, 1, 8, device="meta")}, ValueError, "query on cpu, key on meta"),
    ({"key_TKC": torch.ones(6, 0, 8), "value_TKC": torch.ones(6, 0, 8)}, ValueError, "K >= 1 and C >= 1"),
    ({"layout": PrefixGroup(0, 3, (2, 1))}, TypeError, r"layout is PrefixGroup\(.*\), wanted a tuple of PrefixGroup"),
    ({"layout": (3, 2, 1)}, TypeError, r"layout is \(3, 2, 1\), wanted a tuple of PrefixGroup"),
    ({"layout": (PrefixGroup(0, 3, (2,)),)}, ValueError, "covers 5 tokens, but the row has 6"),
    ({"layout": (PrefixGroup(1, 3, (2,)),)}, ValueError, "wanted start 0"),
    ({"layout": (PrefixGroup(0, 0, (6,)),)}, ValueError, "prompt_len >= 1"),
    ({"value_TKC": torch.ones(6, 2, 8)}, ValueError, r"wanted \[T, H, C\] and twice \[T, K, C\]"),
    ({"query_THC": torch.ones(7, 2, 8)}, ValueError, r"wanted \[T, H, C\] and twice \[T, K, C\]"),
    ({"query_THC": torch.ones(6, 3, 8)} | dict.fromkeys(("key_TKC", "value_TKC"), torch.ones(6, 2, 8)),
     ValueError, "3 query heads, 2 key heads"),
    ({"scale": float("nan")}, ValueError, "scale is nan, wanted a finite number"),
    ({"backend": "dense"}, ValueError, "wanted auto, torch, flash or triton"),
]  # fmt: skip
CLIP = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
PATCHES: list[Case] = [
    ({"rgb_FHW3": [1]}, TypeError, "patchify got frames of type list"),
    *(({"rgb_FHW3": CLIP.new_zeros(shape)}, ValueError, "multiples of 28")
      for shape in ((2, 30, 28, 3), (2, 28, 42, 3), (2, 28, 28, 4), (0, 28, 28, 3), (28, 28, 3))),
    ({"rgb_FHW3": CLIP.int()}, ValueError, r"torch\.int32"),
    ({"patch_px": 16}, ValueError, "multiples of 32"),
    *(({"patch_px": side}, ValueError, f"patch_px {side}, wanted an even number") for side in (15, 0)),
    ({"mean": (0.5,)}, ValueError, r"mean \(0\.5,\)"),
    ({"std": (0.5, 0.0, 0.5)}, ValueError, r"std \(0\.5, 0\.0, 0\.5\)"),
    ({"dtype": torch.float64}, ValueError, "float64"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip
TURN: list[Case] = [
    ({"key_TKC": torch.ones(5, 2, 16)}, ValueError, r"queries \(6, 4, 16\) and keys \(5, 2, 16\)"),
    ({"query_THC": torch.ones(())}, ValueError, r"queries \(\) and keys"),
    ({"cos": torch.ones(6, 8)}, ValueError, r"tables \(6, 8\) .* wanted \(6, 16\)"),
    (dict.fromkeys(("cos", "sin"), torch.ones(3, 6, 16)) | {"sections": (2, 3, 4)},
     ValueError, r"sections \(2, 3, 4\), wanted three that sum to 8"),
    ({"key_TKC": torch.ones(6, 2, 16).bfloat16()}, TypeError, "queries and keys of one"),
]  # fmt: skip


def refuses(function: Callable[..., Any], good: dict[str, Any], case: Case) -> None:
    changes, error, message = case
    with pytest.raises(error, match=message):
        function(**(good | changes))


@pytest.mark.parametrize("case", HEAD, ids=lambda case: case[2][:30])
def test_the_heads(case: Case):
    good = {"hidden_ND": HIDDEN, "weight_VD": WEIGHT, "target_N": TARGET}
    refuses(fused_linear_logprob, good, case)
    refuses(fused_linear_policy_loss, good | {"loss": PolicyLoss(), "tokens": TOKENS}, case)


@pytest.mark.parametrize("case", LOSS, ids=lambda case: case[2][:30])
def test_the_loss_and_its_vectors(case: Case):
    good = {"target_N": TARGET, "loss": PolicyLoss(), "tokens": TOKENS}
    refuses(fused_linear_policy_loss, good | {"hidden_ND": HIDDEN, "weight_VD": WEIGHT}, case)
    refuses(policy_loss, good | {"logits_NV": LOGITS}, case)


@pytest.mark.parametrize("case", LOGIT, ids=lambda case: case[2][:30])
def test_logits(case: Case):
    good = {"logits_NV": LOGITS, "target_N": TARGET}
    refuses(logprob_of_logits, good, case)
    refuses(policy_loss, good | {"loss": PolicyLoss(), "tokens": TOKENS}, case)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case[2][:30])
def test_attention(case: Case):
    good = {
        "query_THC": torch.ones(6, 2, 8),
        "key_TKC": torch.ones(6, 1, 8),
        "value_TKC": torch.ones(6, 1, 8),
        "layout": (PrefixGroup(0, 3, (2, 1)),),
        "scale": 0.5,
    }
    refuses(prefix_attention, good, case)
    assert prefix_attention(**good).shape == (6, 2, 8)


@pytest.mark.parametrize("case", PATCHES, ids=lambda case: case[2][:30])
def test_frames(case: Case):
    refuses(patchify, {"rgb_FHW3": CLIP}, case)


@pytest.mark.parametrize("case", TURN, ids=lambda case: case[2][:30])
def test_rotary(case: Case):
    table = torch.ones(6, 16)
    good = {"query_THC": torch.ones(6, 4, 16), "key_TKC": torch.ones(6, 2, 16), "cos": table, "sin": table}
    refuses(rotary, good, case)
    assert rotary(**good)[0].shape == (6, 4, 16)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"advantage_N": [1.0, 1.0, 1.0]}, TypeError, r"advantage_N is a list, wanted a torch\.Tensor \[N\]"),
        ({"sequence_lens": torch.tensor([1, 2])}, TypeError, r"wanted a tuple of ints, such as tuple\(lens\.tolist"),
        ({"sequence_lens": (1.5, 1.5)}, TypeError, r"sequence_lens are \(1\.5, 1\.5\)"),
        ({"sequence_lens": (4, -1)}, ValueError, "sequence_lens hold -1, wanted lengths >= 0"),
        ({"sequence_lens": (2, 2)}, ValueError, "sequence_lens sum to 4, wanted the 3 tokens"),
        ({"weight_N": torch.ones(2)}, ValueError, r"weight_N is \(2,\), wanted \(3,\)"),
    ],
)
def test_token_vectors(values: dict[str, Any], error: type[Exception], message: str):
    refuses(TokenVectors, {"advantage_N": torch.ones(3), "weight_N": torch.ones(3)}, (values, error, message))


def test_the_rest():
    good = {"hidden_ND": HIDDEN, "weight_VD": WEIGHT, "target_N": TARGET}
    refuses(fused_linear_logprob, good, ({"keep": "logits"}, ValueError, "keep is 'logits', wanted 'auto'"))
    with_gradient = {"keep": "probs", "entropy_grad": True}
    refuses(fused_linear_logprob, good, (with_gradient, ValueError, "keep='probs' has no gradient of the entropy"))
    refuses(attention_backend, {"device": "cpu"}, ({"dtype": "bf16"}, TypeError, r"dtype is 'bf16', wanted a torch"))
    refuses(PolicyLoss, {}, ({"clip_low": "0.2"}, TypeError, "clip_low is '0.2', wanted a number"))
    refuses(PolicyLoss, {}, ({"beta": None}, TypeError, "beta is None, wanted a number"))


def test_what_is_right_passes():
    """The good arguments above, beside -100 and 32-bit targets: log-probs of equal logits are -ln 11."""
    for target in (TARGET, TARGET.int(), torch.tensor([1, -100, 10])):
        wanted = torch.where(target < 0, 0.0, -torch.tensor(11.0).log())
        torch.testing.assert_close(fused_linear_logprob(HIDDEN, WEIGHT, target, torch.ones(3))[0], wanted)
        torch.testing.assert_close(logprob_of_logits(LOGITS, target)[0], wanted)
        loss, _ = fused_linear_policy_loss(HIDDEN, WEIGHT, target, PolicyLoss(), TOKENS, chunk_rows=1)
        assert loss.item() == -3.0  # three tokens of ratio 1, advantage 1, weight 1
