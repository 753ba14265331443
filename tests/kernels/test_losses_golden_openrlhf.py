"""dialect="openrlhf" against the installed OpenRLHF: its own PolicyLoss, aggregate_loss and compute_approx_kl.

Dual clip, rollout correction and counts: integrations/test_openrlhf.py.
"""

import importlib
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
    """The sum that OpenRLHF's actor makes of policy, KL and entropy term. Returns our sums."""
    leaves = batch.leaves()
    mask_BT = batch.mask_BT.long()
    advantage_BT = batch.advantage_B.unsqueeze(1).expand_as(batch.old_BT)
    policy_loss = openrlhf.PolicyLoss(
        clip_eps_low=loss.clip_low,
        clip_eps_high=loss.clip_high,
        token_level_loss=token_level_loss,
        policy_loss_type="gspo" if loss.variant == "gspo" else "ppo",
    )
    theirs = policy_loss(leaves[0], batch.old_BT, advantage_BT, mask_BT, **totals)[0]
    if loss.beta:
        unbiased = loss.kl_gradient == "k2"
        kl_BT = openrlhf.compute_approx_kl(leaves[0], batch.ref_BT, batch.old_BT, loss.kl, unbiased)
        theirs = theirs + loss.beta * openrlhf.aggregate_loss(kl_BT, mask_BT, **totals)
    if loss.entropy_coef:
        theirs = theirs - loss.entropy_coef * openrlhf.aggregate_loss(leaves[1], mask_BT, **totals)
    weights = openrlhf_weights(batch.mask_BT.sum(-1), loss.variant, token_level_loss, **totals)
    return assert_same_loss(batch, loss, batch.tokens(weights), theirs, leaves)


def make_loss(variant: str = "grpo", **values) -> PolicyLoss:
    return PolicyLoss(variant, "openrlhf", *clip_bounds(variant), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_log_ratios_beyond_the_clamps(openrlhf, float_is_double, variant):
    sums = compare(openrlhf, make_batch(3).extreme(), make_loss(variant, beta=0.3))
    assert_both_sides_clipped(variant, sums)


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
