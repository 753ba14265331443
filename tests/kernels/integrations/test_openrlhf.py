"""Our PolicyLoss and Actor.forward next to OpenRLHF's, from the installed package (deepspeed and flash_attn absent)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vcr1_kernels.integrations import openrlhf as vcr1_openrlhf

from tests.kernels.integrations.openrlhf_peer import import_openrlhf_models
from tests.kernels.integrations.tiny_qwen2 import WIDTH, tiny_qwen2
from tests.kernels.padded_batch import make_batch

pytest.importorskip("openrlhf")
pytest.importorskip("peft")  # openrlhf.models.actor imports it
models = import_openrlhf_models()

VOCAB = 97


@pytest.fixture(autouse=True)
def restored_forward() -> Iterator[None]:
    before = models.Actor.forward
    yield
    assert models.Actor.forward is before, "a test left our forward in place"


def action_batch() -> dict[str, torch.Tensor]:
    """One mask has a hole; without the sample that has no token, of which OpenRLHF makes NaN."""
    batch = make_batch(4)
    counted = batch.mask_BT.any(-1)
    fields = {
        "log_probs": batch.logprob_BT,
        "old_log_probs": batch.old_BT,
        "advantages": batch.advantage_B[:, None] + 0.5 * batch.entropy_BT,
        "action_mask": batch.mask_BT,
        "rollout_log_probs": batch.sampling_BT,
    }
    return {name: values[counted] for name, values in fields.items()}


LOSS_OPTIONS = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.5},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.1},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.08)},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02)},
]


def loss_and_gradient(loss_function: Callable[..., Any], **totals: Any) -> tuple[Any, torch.Tensor]:
    batch = action_batch()
    batch["log_probs"].requires_grad_()
    results = loss_function(**batch, **totals)
    results[0].backward()
    assert batch["log_probs"].grad is not None
    return results, batch["log_probs"].grad


@pytest.mark.parametrize(
    "totals", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9}], ids=["", "global"]
)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_policy_loss_equals_theirs(options: dict[str, Any], totals: dict[str, Any]):
    ours, our_gradient = loss_and_gradient(vcr1_openrlhf.PolicyLoss(**options), **totals)
    theirs, their_gradient = loss_and_gradient(models.PolicyLoss(**options), **totals)
    assert our_gradient.abs().max() > 0
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-15)
    assert len(ours) == len(theirs) == 5
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:  # their fractions are float32
            torch.testing.assert_close(mine.double(), wanted.double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-15)


def test_the_batch_reaches_every_filter():
    for options in LOSS_OPTIONS[5:]:
        results, _ = loss_and_gradient(vcr1_openrlhf.PolicyLoss(**options))
        assert 0 < results[4] < 1, options


def test_policy_loss_takes_their_arguments():
    ours, theirs = vcr1_openrlhf.PolicyLoss, models.PolicyLoss
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert [*inspect.signature(ours.forward).parameters] == [*inspect.signature(theirs.forward).parameters]
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert inspect.signature(ours).parameters[name].default == parameter.default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 0.9}, "dual_clip"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "is_correction_mode"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "upper bound only"),
    ],
)
def test_policy_loss_refuses_what_theirs_refuses(options: dict[str, Any], message: str):
    with pytest.raises((ValueError, AssertionError)):
        models.PolicyLoss(**options)
    with pytest.raises(ValueError, match=message):
        vcr1_openrlhf.PolicyLoss(**options)


def test_an_unknown_type_is_refused_when_built():
    with pytest.raises(ValueError, match="wanted ppo or gspo"):
        vcr1_openrlhf.PolicyLoss(policy_loss_type="reinforce")  # pyright: ignore[reportArgumentType]


def test_policy_loss_needs_the_rollout_for_the_correction():
    batch = action_batch()
    batch.pop("rollout_log_probs")
    with pytest.raises(ValueError, match="rollout_log_probs is None"):
        vcr1_openrlhf.PolicyLoss(is_correction_level="token")(**batch)


def build_actor(model: nn.Module, temperature: float = 0.7) -> Any:
    actor = models.Actor(model, temperature=temperature)
    actor.packing_samples = False  # `Actor` sets it only for a model that it loads by name
    return actor


def sequences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [3, 12], action mask [3, 5], attention mask): prompts padded on the left, answers on the right."""
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(8))
    action_mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    prompt_mask = torch.arange(7).flip(0) < torch.tensor([7, 4, 2])[:, None]
    return tokens, action_mask, torch.cat([prompt_mask, action_mask], 1).long()


def run_actor(actor: Any, entropy_weight: float | None, **call: Any) -> tuple[torch.Tensor, ...]:
    """What ppo_actor.py does with an Actor: log-probs, entropy where the mask counts, and the gradient of both."""
    tokens, action_mask, attention_mask = sequences()
    logprob, output = actor(
        tokens, action_mask, attention_mask=attention_mask, return_output=True,
        return_entropy=entropy_weight is not None, packed_seq_lens=None, ring_attn_group=None, **call,
    )  # fmt: skip
    loss = (torch.linspace(-1, 1, logprob.numel()).view_as(logprob) * logprob).sum()
    values = [logprob.detach()]
    if entropy_weight is not None:
        entropy = output.entropy[:, -action_mask.shape[1] :] * action_mask
        values.append(entropy.detach())
        loss = loss + entropy_weight * entropy.sum()
    actor.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    return *values, *gradients.values()


def assert_close(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):  # float32 sums in another order, through two layers
        assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("entropy_weight", [None, 0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor_forward_equals_theirs(entropy_weight: float | None, temperature: float):
    actor = build_actor(tiny_qwen2(VOCAB), temperature)
    theirs = run_actor(actor, entropy_weight)
    with vcr1_openrlhf.use_fused_head() as head:
        ours = run_actor(actor, entropy_weight)
    assert head.fused_calls == 1 and head.openrlhf_calls == {}
    assert_close(ours, theirs)


class Engine(nn.Module):
    """As DeepSpeed wraps a model: its own `config`, the rest passed on."""

    config: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, {"zero_optimization": {"stage": 3}}

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)


def test_inside_an_engine():
    theirs = run_actor(build_actor(tiny_qwen2(VOCAB)), 0.1)
    actor = build_actor(Engine(tiny_qwen2(VOCAB)))
    with vcr1_openrlhf.use_fused_head() as head:
        ours = run_actor(actor, 0.1)
        assert_close(ours, theirs)
        actor.model.module.config.logit_scale = 0.5
        with pytest.warns(UserWarning, match="logit_scale"):
            run_actor(actor, None)
    assert head.fused_calls == 1


def test_lora_on_a_frozen_head():
    peft = importlib.import_module("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_qwen2(VOCAB), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    actor = build_actor(model)
    theirs = run_actor(actor, None)
    with vcr1_openrlhf.use_fused_head() as head:
        ours = run_actor(actor, None)
    assert head.fused_calls == 1
    assert len(ours) == 1 + 12  # log-probs; 2 layers x 3 projections x 2 factors
    assert_close(ours, theirs)


def test_only_action_tokens_go_through_the_head(monkeypatch: pytest.MonkeyPatch):
    rows = []
    scoring = inspect.getmodule(vcr1_openrlhf.score_wanted_tokens)
    exact = scoring.fused_linear_logprob
    monkeypatch.setattr(scoring, "fused_linear_logprob", lambda h, *a, **k: (rows.append(len(h)), exact(h, *a, **k))[1])
    with vcr1_openrlhf.use_fused_head():
        run_actor(build_actor(tiny_qwen2(VOCAB)), None)
    assert rows == [5 + 2 + 4]  # of 36 positions


def test_all_log_probs_when_asked():
    """SFT's and DPO's call: log-probs of every position, no action mask."""
    tokens, _, attention_mask = sequences()
    actor = build_actor(tiny_qwen2(VOCAB))
    call = {"attention_mask": attention_mask, "return_logprobs": True, "return_output": True}
    theirs, _ = actor(tokens, **call)
    with vcr1_openrlhf.use_fused_head() as head:
        ours, output = actor(tokens, **call)
    assert head.fused_calls == 1 and output.logits is None
    assert_close((ours.detach(),), (theirs.detach(),))


def test_packed_samples(monkeypatch: pytest.MonkeyPatch):
    """Packing is flash_attn's; here a plain stand-in for its two functions of the same arguments and results."""
    actor_symbols = inspect.getmodule(models.Actor)

    def unpad(tokens: torch.Tensor, mask: torch.Tensor, group: None) -> tuple[Any, ...]:
        indices = mask.reshape(-1).nonzero().squeeze(1)
        rolled, positions = tokens.roll(-1, 1), (mask.cumsum(-1) - 1).clamp(min=0)
        packed = (x.reshape(-1)[indices].unsqueeze(0) for x in (tokens, positions, rolled))
        return *packed, 0, indices

    def pad(
        values: torch.Tensor, group: None, pad_len: int, indices: torch.Tensor, batch: int, length: int
    ) -> torch.Tensor:
        return values.new_zeros(batch * length).index_copy(0, indices, values.reshape(-1)).view(batch, length)

    monkeypatch.setattr(actor_symbols, "unpad_and_slice_tensor", unpad)
    monkeypatch.setattr(actor_symbols, "gather_and_pad_tensor", pad)
    actor = build_actor(tiny_qwen2(VOCAB))
    actor.packing_samples = True
    theirs = run_actor(actor, 0.1)
    with vcr1_openrlhf.use_fused_head() as head:
        ours = run_actor(actor, 0.1)
    assert head.fused_calls == 1
    assert_close(ours, theirs)


def test_a_vision_model(make_tiny_model: Callable[..., Any]):
    """Image tokens and their kinds reach the model as OpenRLHF sends them."""
    model = make_tiny_model()
    model.requires_grad_(False)
    actor = build_actor(model)
    actor.is_vlm, actor._vlm_config = True, model.config
    tokens = torch.randint(0, 200, (1, 14), generator=torch.Generator().manual_seed(8))
    tokens[:, 2:6] = model.config.image_token_id
    tokens[:, 1] = model.config.vision_start_token_id
    images = {
        "pixel_values": torch.randn(16, 1176, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    action_mask = torch.tensor([[1, 1, 0, 1]])
    call = {"attention_mask": torch.ones_like(tokens), **images}
    theirs = actor(tokens, action_mask, **call)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    with vcr1_openrlhf.use_fused_head() as head:
        ours = actor(tokens, action_mask, **call)
    assert head.fused_calls == 1
    assert seen[0]["mm_token_type_ids"].sum() == 4
    assert_close((ours,), (theirs,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(VOCAB))), "bias"),
        (lambda model: setattr(model.config, "final_logit_softcapping", 30.0), "final_logit_softcapping"),
        (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "Sequential"),
    ],
    ids=["bias", "softcap", "wrapped"],
)
def test_what_our_head_does_not_compute_stays_theirs(change: Callable[[Any], None], reason: str):
    model = tiny_qwen2(VOCAB)
    change(model)
    actor = build_actor(model)
    theirs = run_actor(actor, 0.1)
    with vcr1_openrlhf.use_fused_head() as head, pytest.warns(UserWarning, match=reason):
        ours = run_actor(actor, 0.1)
    assert head.fused_calls == 0 and len(head.openrlhf_calls) == 1
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours, theirs, strict=True))


def test_logits_when_asked():
    tokens, _, attention_mask = sequences()
    with vcr1_openrlhf.use_fused_head(), pytest.warns(UserWarning, match="logits themselves"):
        output = build_actor(tiny_qwen2(VOCAB))(tokens, attention_mask=attention_mask, return_output=True)
    assert output.logits.shape == (3, 12, VOCAB)


def test_the_head_is_itself_again_after_an_error():
    actor = build_actor(tiny_qwen2(VOCAB))
    tokens, action_mask, attention_mask = sequences()
    actor.model.model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("no memory"))
    with vcr1_openrlhf.use_fused_head(), pytest.raises(RuntimeError, match="no memory"):
        actor(tokens, action_mask, attention_mask=attention_mask)
    assert "forward" not in vars(actor.model.lm_head)
    assert actor.model.lm_head(torch.zeros(1, WIDTH)).shape == (1, VOCAB)


def test_their_arguments_are_the_ones_our_forward_was_written_for():
    """`Actor.forward` is replaced whole: a new argument of theirs must not be lost in silence."""
    names = [*inspect.signature(models.Actor.forward).parameters]
    assert names == [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs",
        "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
    ]  # fmt: skip


def test_a_second_call_replaces_the_first():
    before = models.Actor.forward
    first = vcr1_openrlhf.use_fused_head()
    second = vcr1_openrlhf.use_fused_head(chunk_rows=2)
    assert second.original is before
    first.undo()  # no longer in place: changes nothing
    assert models.Actor.forward is not before
    second.undo()
    assert models.Actor.forward is before
    assert SimpleNamespace(**second.options).chunk_rows == 2
