"""Our losses and our head inside verl, next to verl's own functions on the same inputs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tests.kernels.integrations.tiny_qwen2 import WIDTH, tiny_qwen2
from tests.kernels.padded_batch import make_batch

pytest.importorskip("verl")
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
verl_losses = pytest.importorskip("verl.workers.utils.losses")
tensordicts = pytest.importorskip("verl.utils.tensordict_utils")
padding = pytest.importorskip("verl.workers.utils.padding")
ActorConfig = pytest.importorskip("verl.workers.config").ActorConfig

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
THEIRS = {"vcr1_grpo": "vanilla", "vcr1_gspo": "gspo", "vcr1_cispo": "cispo", "vcr1_sapo": "sapo"}
GLOBAL_TOTALS = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 9, "loss_scale_factor": 17}
VOCAB = 97


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The module as verl's `external_lib` imports it; everything it replaced is put back."""
    module = importlib.import_module("vcr1_kernels.integrations.verl")
    module.head.undo()  # each test puts in place what it needs
    yield module
    for name in module.LOSSES:
        del core_algos.POLICY_LOSS_REGISTRY[name]


@pytest.fixture
def put_head(plugin: Any) -> Iterator[Callable[..., Any]]:
    heads = []

    def put(**options: Any) -> Any:
        heads.append(plugin.replace_head(**options))
        return heads[-1]

    yield put
    for head in heads:
        head.undo()


def actor_config(totals: dict[str, Any], **options: Any) -> Any:
    """clip-higher, and bounds narrow enough that every kind of clipping happens on the batch below."""
    fields = {
        "clip_ratio_low": 0.1,
        "clip_ratio_high": 0.3,
        "clip_ratio_c": 1.5,
        "tau_pos": 1.1,
        "tau_neg": 1.3,
        **options,
    }
    return ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, global_batch_info=totals, **fields)


def padded_batch() -> dict[str, torch.Tensor]:
    """A mask has a hole, one counts no token; some log-ratios are beyond every clamp; advantages are of each token."""
    batch = make_batch(5).extreme()
    return {
        "old_log_prob": batch.old_BT,
        "log_prob": batch.logprob_BT,
        "advantages": batch.advantage_B[:, None] + 0.5 * batch.entropy_BT,
        "response_mask": batch.mask_BT,
    }


def loss_gradient_metrics(function: Callable[..., Any], batch: dict[str, torch.Tensor], **arguments: Any) -> tuple:
    logprob = batch["log_prob"].clone().requires_grad_()
    loss, metrics = function(**{**batch, "log_prob": logprob}, **arguments)
    loss.backward()
    return loss.detach(), logprob.grad, metrics


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
def test_losses_equal_verls(plugin: Any, name: str, loss_agg_mode: str, is_global: bool):
    batch = padded_batch()
    config = actor_config(dict(GLOBAL_TOTALS) if is_global else {})
    rollout_is_weights = 2 * torch.linspace(0, 1, batch["log_prob"].numel()).double().view_as(batch["log_prob"])
    arguments = {
        "loss_agg_mode": loss_agg_mode,
        "config": config,
        "rollout_is_weights": rollout_is_weights if is_global else None,
    }
    ours = loss_gradient_metrics(core_algos.get_policy_loss_fn(name), batch, **arguments)
    theirs = loss_gradient_metrics(core_algos.get_policy_loss_fn(THEIRS[name]), batch, **arguments)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-14)
    assert ours[1].abs().max() > 0
    assert ours[2].keys() == theirs[2].keys()
    for metric, value in theirs[2].items():
        assert ours[2][metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric  # verl's fractions are float32


def test_the_batch_reaches_every_clip(plugin: Any):
    metrics = loss_gradient_metrics(plugin.VerlPolicyLoss("grpo"), padded_batch(), config=actor_config({}))[2]
    assert metrics["actor/pg_clipfrac"] > 0.2
    assert metrics["actor/pg_clipfrac_lower"] > 0.05


def test_no_counted_token_gives_zero(plugin: Any):
    batch = padded_batch()
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    for name in THEIRS:
        loss, gradient, metrics = loss_gradient_metrics(
            core_algos.get_policy_loss_fn(name), batch, config=actor_config({})
        )
        assert loss == 0 and gradient.abs().max() == 0 and set(metrics.values()) == {0.0}, name


def test_a_mean_over_ranks_needs_its_total(plugin: Any):
    with pytest.raises(ValueError, match="token-mean over 2 ranks needs batch_num_tokens"):
        loss_gradient_metrics(plugin.VerlPolicyLoss("grpo"), padded_batch(), config=actor_config({"dp_size": 2}))
    with pytest.raises(ValueError, match="got no config"):
        loss_gradient_metrics(plugin.VerlPolicyLoss("grpo"), padded_batch())


def test_the_gradient_of_an_entropy_bonus_is_not_given_away(plugin: Any, put_head: Callable[..., Any]):
    with pytest.raises(ValueError, match="entropy_grad=False"):
        put_head(keep="probs")
    put_head(keep="probs", entropy_grad=False)
    loss = plugin.VerlPolicyLoss("grpo")
    assert loss_gradient_metrics(loss, padded_batch(), config=actor_config({}))[1].abs().max() > 0
    with pytest.raises(ValueError, match=r"entropy_coeff is 0\.01"):
        loss_gradient_metrics(loss, padded_batch(), config=actor_config({}, entropy_coeff=0.01))


def packed_batch(prompt_lens: tuple[int, ...] = (4, 2, 6), response_lens: tuple[int, ...] = (5, 3, 1)) -> Any:
    """A micro-batch in verl's layout without padding: nested tokens, and per-response vectors."""
    generator = torch.Generator().manual_seed(11)

    def nested(lengths: tuple[int, ...], make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([make(length) for length in lengths], layout=torch.jagged)

    total_lens = tuple(p + r for p, r in zip(prompt_lens, response_lens, strict=True))
    tokens = [torch.randint(0, VOCAB, (length,), generator=generator) for length in total_lens]
    vectors = {
        name: nested(response_lens, lambda n: torch.randn(n, generator=generator) - 2.0)
        for name in ("old_log_probs", "advantages", "ref_log_prob")
    }
    return tensordicts.get_tensordict(
        {
            "input_ids": torch.nested.as_nested_tensor(tokens, layout=torch.jagged),
            "position_ids": nested(total_lens, torch.arange),
            "prompts": torch.nested.as_nested_tensor(
                [t[:p] for t, p in zip(tokens, prompt_lens, strict=True)], layout=torch.jagged
            ),
            "responses": torch.nested.as_nested_tensor(
                [t[p:] for t, p in zip(tokens, prompt_lens, strict=True)], layout=torch.jagged
            ),
            "response_mask": nested(response_lens, lambda n: torch.ones(n, dtype=torch.bool)),
            **vectors,
        },
        {
            "use_remove_padding": True,
            "use_fused_kernels": True,
            "calculate_entropy": True,
            "temperature": 0.7,
            "dp_size": 1,
            "batch_num_tokens": None,
            "global_batch_size": None,
        },
    )


def test_inside_verls_ppo_loss(plugin: Any):
    """verl's own caller: it subtracts the entropy in place from the loss it gets, and adds the KL."""
    batch = packed_batch()
    num_tokens = batch["input_ids"].values().numel()
    results = []
    for name in ("vcr1_grpo", "vanilla"):
        config = actor_config({}, entropy_coeff=0.01, use_kl_loss=True, policy_loss={"loss_mode": name})
        generator = torch.Generator().manual_seed(3)
        outputs = {
            key: -torch.rand(num_tokens, generator=generator).requires_grad_() for key in ("log_probs", "entropy")
        }
        leaves = {key: value.detach().requires_grad_() for key, value in outputs.items()}
        loss, metrics = verl_losses.ppo_loss(config, leaves, batch)
        loss.backward()
        results.append((loss.detach(), leaves["log_probs"].grad, leaves["entropy"].grad, metrics.keys()))
    ours, theirs = results
    for mine, wanted in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=1e-7)
    assert ours[3] == theirs[3]


@pytest.fixture(scope="module")
def tiny_model() -> Qwen2ForCausalLM:
    return tiny_qwen2(VOCAB)


def forward_of(model: Qwen2ForCausalLM, backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What verl's `patch_forward_with_backends` puts on the class of a model for this backend."""
    monkey_patch = importlib.import_module("verl.models.transformers.monkey_patch")
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # restored after the test
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    return model.forward


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 23, WIDTH, generator=generator)
    return (
        hidden,
        0.4 * torch.randn(VOCAB, WIDTH, generator=generator),
        torch.randint(0, VOCAB, (1, 23), generator=generator),
    )


def score(function: Callable[..., Any], entropy_weight: float = 0.3) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels = head_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, entropy = function(hidden, weight, labels, 0.7)
    factor = torch.linspace(-1, 1, labels.numel()).view_as(logprob)
    ((factor * logprob).sum() + entropy_weight * (factor.square() * entropy).sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return logprob.detach().view(-1), entropy.detach().view(-1), hidden.grad, weight.grad


@pytest.mark.parametrize("entropy_weight", [0.3, 0.0])
def test_the_head_equals_fused_linear_for_ppo(put_head: Callable[..., Any], entropy_weight: float):
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    theirs = score(module, entropy_weight)
    head = put_head()
    for ours in (score(module, entropy_weight), score(triton_symbol().linear_cross_entropy, entropy_weight)):
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=5e-6, atol=5e-6)
    assert head.fused_calls == 2 and head.verl_calls == {}


def triton_symbol() -> Any:
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy")


def test_what_our_head_does_not_compute_stays_verls(put_head: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_symbol(), "linear_cross_entropy", lambda *arguments: arguments[4:])
    head = put_head()
    hidden, weight, labels = head_inputs()
    with pytest.warns(UserWarning, match="reduction mean"):
        assert triton_symbol().linear_cross_entropy(hidden, weight, labels, 1.0, "mean") == ("mean", None)
    with pytest.warns(UserWarning, match="split over ranks"):
        assert triton_symbol().linear_cross_entropy(hidden, weight, labels, 1.0, "none", "group") == ("none", "group")
    with pytest.warns(UserWarning, match="float16"):
        assert triton_symbol().linear_cross_entropy(hidden.half(), weight, labels) == ("none", None)
    assert head.fused_calls == 0 and sum(head.verl_calls.values()) == 3


class BareEngine(SimpleNamespace):
    """What `prepare_model_inputs` reads of the FSDP engine, and no more."""

    pad_to_length = 0
    use_ulysses_sp = False

    def _get_packed_pad_size(self, _: int) -> int:
        return self.pad_size


def run_engine(
    model: Qwen2ForCausalLM, forward: Callable[..., Any], batch: Any, pad_size: int
) -> tuple[torch.Tensor, ...]:
    """verl's path from micro-batch to padded per-response values, and the gradient of a loss on them."""
    engine_class = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
    inputs, _ = engine_class.prepare_model_inputs(BareEngine(pad_size=pad_size), batch)
    output = forward(**inputs, use_cache=False)
    num_tokens = batch["input_ids"].values().numel()
    values = [
        padding.no_padding_2_padding(x.reshape(-1)[:num_tokens], batch) for x in (output.log_probs, output.entropy)
    ]
    model.zero_grad()
    (values[0].square().sum() + 0.1 * values[1].sum()).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return *(value.detach() for value in values), *gradients


@pytest.mark.parametrize("pad_size", [0, 5])
@pytest.mark.parametrize("is_dense", [False, True], ids=["nested", "padded"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_through_verls_engine_only_response_positions_are_scored(
    put_head: Callable[..., Any], tiny_model: Any, monkeypatch: pytest.MonkeyPatch,
    backend: str, is_dense: bool, pad_size: int,
):  # fmt: skip
    batch = packed_batch()
    if is_dense:
        batch = with_padded_responses(batch)
    theirs = run_engine(tiny_model, forward_of(tiny_model, "torch", monkeypatch), batch, pad_size)
    forward = forward_of(tiny_model, backend, monkeypatch)
    put_head()
    rows = []
    scoring = importlib.import_module("vcr1_kernels.integrations.score_tokens")
    exact = scoring.fused_linear_logprob
    monkeypatch.setattr(scoring, "fused_linear_logprob", lambda h, *a, **k: (rows.append(len(h)), exact(h, *a, **k))[1])
    ours = run_engine(tiny_model, forward, batch, pad_size)
    assert rows == [5 + 3 + 1]  # of 21 packed positions
    assert len(ours) == len(theirs) > 10
    for mine, wanted in zip(ours, theirs, strict=True):
        # float32 sums in another order, through two layers; small entries of a gradient are sums of large ones
        assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def with_padded_responses(batch: Any) -> Any:
    """The other layout verl knows: responses [B, L] and an attention mask over prompt (left-padded) and response."""
    prompts, responses = batch["prompts"], batch["responses"]
    prompt_lens, response_lens = prompts.offsets().diff(), responses.offsets().diff()
    batch["prompts"] = prompts.to_padded_tensor(0)
    batch["responses"] = responses.to_padded_tensor(0)
    left = torch.arange(batch["prompts"].shape[1]).flip(0) < prompt_lens[:, None]
    right = torch.arange(batch["responses"].shape[1]) < response_lens[:, None]
    batch["attention_mask"] = torch.cat([left, right], 1).long()
    return batch


def test_all_positions_when_asked(put_head: Callable[..., Any]):
    engine_class = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
    original = engine_class.prepare_model_inputs
    put_head(responses_only=False)
    assert engine_class.prepare_model_inputs is original
    put_head()
    assert engine_class.prepare_model_inputs is not original
    labels = engine_class.prepare_model_inputs(BareEngine(pad_size=0), packed_batch())[0]["shift_labels"]
    assert (labels != -100).sum() == 9


@pytest.mark.parametrize(
    ("engine", "missing"), [(SimpleNamespace(use_ulysses_sp=True), ""), (BareEngine(), "responses")]
)
def test_labels_stay_where_the_positions_of_responses_are_not_known(plugin: Any, engine: Any, missing: str):
    batch = packed_batch()
    if missing:
        batch.pop(missing)
    labels = batch["input_ids"].values().roll(-1).unsqueeze(0)
    wrapped = plugin._prepare_model_inputs(lambda *_: ({"shift_labels": labels.clone()}, {}))
    assert torch.equal(wrapped(engine, batch)[0]["shift_labels"], labels)


def test_as_verl_imports_it():
    """In a fresh process, while verl's own `__init__` runs: the earliest moment at which verl imports a module."""
    root = Path(__file__).parents[3]
    code = (
        "import verl, sys; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get;"
        "plugin = sys.modules['vcr1_kernels.integrations.verl']; assert plugin.head._undo;"
        "print('losses', [get(name).variant for name in plugin.LOSSES])"
    )
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "vcr1_kernels.integrations.verl",
        "PYTHONPATH": os.pathsep.join([str(root / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "losses ['grpo', 'gspo', 'cispo', 'sapo']" in done.stdout


def test_undo_restores_verls_functions(plugin: Any):
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    before = module.forward, triton_symbol().linear_cross_entropy
    head = plugin.replace_head()
    assert module.forward is not before[0]
    plugin.replace_head().undo()
    head.undo()
    assert (module.forward, triton_symbol().linear_cross_entropy) == before
