"""dialect="openrlhf" against the installed OpenRLHF: its own PolicyLoss, aggregate_loss and compute_approx_kl."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import Tensor
from vcr1_kernels.losses import PolicyLoss, openrlhf_weights

from tests.kernels.integrations.openrlhf_peer import import_openrlhf_models
from tests.kernels.padded_batch import PaddedBatch, assert_both_sides_clipped, assert_same_loss, clip_bounds, make_batch


@pytest.fixture(scope="module")
def openrlhf() -> SimpleNamespace:
    try:
        import_openrlhf_models()
    except ImportError as error:
        pytest.skip(f"openrlhf cannot be imported (pip install --no-deps openrlhf==0.11.2 and peft): {error}")
    loss = importlib.import_module("openrlhf.models.loss")
    utils = importlib.import_module("openrlhf.models.utils")
    return SimpleNamespace(
        PolicyLoss=loss.PolicyLoss,
        aggregate_loss=loss.aggregate_loss,
        compute_approx_kl=utils.compute_approx_kl,
    )


@pytest.fixture
def float_is_double(monkeypatch: pytest.MonkeyPatch):
    """compute_approx_kl casts to float32 by `.float()`; its formulas are compared in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def compare(openrlhf, batch: PaddedBatch, loss: PolicyLoss, token_level_loss: bool = True, **totals):
    """The sum that OpenRLHF's actor makes of policy, KL and entropy term. Returns (our sums, their four metrics)."""
    leaves = batch.leaves()
    mask_BT = batch.mask_BT.long()
    advantage_BT = batch.advantage_B.unsqueeze(1).expand_as(batch.old_BT)
    level, mode = loss.sampling_correction.split("_") if loss.sampling_correction != "none" else ("off", "mask")
    floor, cap = loss.sampling_floor or 0.0, loss.sampling_cap
    policy_loss = openrlhf.PolicyLoss(
        clip_eps_low=loss.clip_low,
        clip_eps_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        token_level_loss=token_level_loss,
        policy_loss_type="gspo" if loss.variant == "gspo" else "ppo",
        is_correction_level={"sequence": "seq"}.get(level, level),
        is_correction_mode={"truncate": "clip"}.get(mode, mode),
        is_correction_gating=loss.sampling_gate,
        is_correction_threshold=[floor, float("inf") if cap is None else cap],
    )
    theirs, *metrics = policy_loss(
        leaves[0], batch.old_BT, advantage_BT, mask_BT, rollout_log_probs=batch.sampling_BT, **totals
    )
    if loss.beta:
        unbiased = loss.kl_gradient == "k2"
        kl_BT = openrlhf.compute_approx_kl(leaves[0], batch.ref_BT, batch.old_BT, loss.kl, unbiased)
        theirs = theirs + loss.beta * openrlhf.aggregate_loss(kl_BT, mask_BT, **totals)
    if loss.entropy_coef:
        theirs = theirs - loss.entropy_coef * openrlhf.aggregate_loss(leaves[1], mask_BT, **totals)
    weights = openrlhf_weights(batch.mask_BT.sum(-1), loss.variant, token_level_loss, **totals)
    return assert_same_loss(batch, loss, batch.tokens(weights), theirs, leaves), metrics


def make_loss(variant: str = "grpo", **values) -> PolicyLoss:
    return PolicyLoss(variant, "openrlhf", *clip_bounds(variant), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("variant", ["grpo", "dapo", "gspo"])
def test_policy_term(openrlhf, variant, token_level_loss, seed):
    sums, _ = compare(openrlhf, make_batch(seed), make_loss(variant), token_level_loss)
    assert_both_sides_clipped(variant, sums)


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_log_ratios_beyond_the_clamps(openrlhf, float_is_double, variant):
    compare(openrlhf, make_batch(3).extreme(), make_loss(variant, beta=0.3))


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_totals_of_the_step(openrlhf, float_is_double, variant, token_level_loss):
    totals = {"dp_size": 2, "batch_num_tokens": 90.0, "global_batch_size": 20.0}
    loss = make_loss(variant, beta=0.3, entropy_coef=0.1)
    compare(openrlhf, make_batch(4), loss, token_level_loss, **totals)
    compare(openrlhf, make_batch(4), loss, token_level_loss)


@pytest.mark.parametrize("kl_gradient", [None, "k2"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl(openrlhf, float_is_double, kl, kl_gradient):
    compare(openrlhf, make_batch(5).extreme(), make_loss(beta=0.3, kl=kl, kl_gradient=kl_gradient))


@pytest.mark.parametrize("dual_clip", [1.4, 10.0])
@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_dual_clip(openrlhf, variant, dual_clip):
    sums, _ = compare(openrlhf, make_batch(6).extreme(), make_loss(variant, dual_clip=dual_clip))
    assert sums["clipped_dual"] > 0 or variant == "gspo"


@pytest.mark.parametrize(
    ("mode", "gate", "floor", "cap"),
    [
        ("token_truncate", "ratio", 0.7, 1.4),
        ("token_mask", "ratio", 0.7, 1.4),
        ("sequence_mask", "ratio", 0.9, 1.05),
        ("token_mask", "binary_kl", None, 0.02),
        ("token_mask", "tv", None, 0.05),
        ("sequence_mask", "binary_kl", None, 0.05),
        ("sequence_mask", "tv", None, 0.08),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_rollout_correction(openrlhf, mode, gate, floor, cap, seed):
    loss = make_loss(sampling_correction=mode, sampling_gate=gate, sampling_floor=floor, sampling_cap=cap)
    batch = make_batch(seed)
    sums, (*_, filtered) = compare(openrlhf, batch, loss)
    assert 0 < sums["sampling_cut"] < sums["tokens"]
    if mode.startswith("token"):
        assert float(sums["sampling_cut"] / sums["tokens"]) == pytest.approx(float(filtered), rel=1e-6)


def test_gspo_with_correction_is_gspo_against_the_engine(openrlhf):
    batch = make_batch(7)
    theirs_loss = openrlhf.PolicyLoss(*clip_bounds("gspo"), policy_loss_type="gspo", is_correction_level="token")
    leaves = batch.leaves()
    advantage_BT = batch.advantage_B.unsqueeze(1).expand_as(batch.old_BT)
    theirs = theirs_loss(leaves[0], batch.old_BT, advantage_BT, batch.mask_BT.long(), batch.sampling_BT)[0]
    tokens = batch.tokens(openrlhf_weights(batch.mask_BT.sum(-1), "gspo"))
    against_engine = replace(tokens, old_logprob_N=tokens.sampling_logprob_N)
    assert_same_loss(batch, make_loss("gspo"), against_engine, theirs, leaves)


def test_metrics_are_those_of_openrlhf(openrlhf):
    sums, (clip_ratio, ppo_kl, *_) = compare(openrlhf, make_batch(8), make_loss())
    num_tokens = int(sums["tokens"])
    clipped = float(sums["clipped_low"] + sums["clipped_high"])
    assert clipped > 0
    assert clipped / num_tokens == pytest.approx(float(clip_ratio), rel=1e-6)
    assert -float(sums["log_ratio"]) / num_tokens == pytest.approx(float(ppo_kl), rel=1e-6)
