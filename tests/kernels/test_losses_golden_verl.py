"""dialect="verl" against the installed verl: its own `ppo_loss` (policy, entropy, KL), on padded float64 batches.

Dual clip, counts and advantages of each token: integrations/test_verl.py.
"""

from typing import get_args

import pytest
from torch import Tensor
from vcr1_kernels.loss_weights import VerlMode
from vcr1_kernels.losses import PolicyLoss, verl_weights

from tests.kernels.padded_batch import (
    MAX_LENGTH,
    PaddedBatch,
    assert_both_sides_clipped,
    assert_same_loss,
    clip_bounds,
    make_batch,
)

REASON = "verl is not installed (pip install --no-deps verl==0.9.1 and what it imports)"
tensordict = pytest.importorskip("tensordict", reason=REASON)
verl_losses = pytest.importorskip("verl.workers.utils.losses", reason=REASON)
verl_config = pytest.importorskip("verl.workers.config", reason=REASON)
rollout_correction = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason=REASON)

LOSS_MODES = {variant: variant for variant in ("gspo", "cispo", "sapo")}  # the others: vanilla
OWN_MODE: dict[str, VerlMode] = {  # the aggregation of the variant's paper
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
}
VARIANTS = tuple(OWN_MODE)


@pytest.fixture(autouse=True)
def logprobs_are_padded_already(monkeypatch: pytest.MonkeyPatch):
    """ppo_loss gets nested tensors from verl's engine and pads them; here it gets padded ones."""
    monkeypatch.setattr(verl_losses, "no_padding_2_padding", lambda values, data: values)


def actor_config(loss: PolicyLoss, loss_agg_mode: VerlMode, loss_scale_factor: int | None):
    kl_types = {"estimator": loss.kl, None: loss.kl, "k2": f"{loss.kl}+"}
    return verl_config.ActorConfig(
        strategy="fsdp",
        rollout_n=8,
        use_dynamic_bsz=True,
        clip_ratio_low=loss.clip_low,
        clip_ratio_high=loss.clip_high,
        clip_ratio_c=3.0 if loss.dual_clip is None else loss.dual_clip,
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=loss_scale_factor,
        entropy_coeff=loss.entropy_coef,
        tau_pos=loss.sapo_tau_pos,
        tau_neg=loss.sapo_tau_neg,
        use_kl_loss=loss.beta > 0,
        kl_loss_coef=loss.beta,
        kl_loss_type=kl_types[loss.kl_gradient],
        policy_loss=verl_config.PolicyLossConfig(loss_mode=LOSS_MODES.get(loss.variant, "vanilla")),
    )


def correction_weights(loss: PolicyLoss, batch: PaddedBatch) -> Tensor:
    level, mode = loss.sampling_correction.split("_")
    threshold = loss.sampling_cap if mode == "truncate" else f"{loss.sampling_floor}_{loss.sampling_cap}"
    log_ratio_BT = batch.old_BT - batch.sampling_BT
    compute = rollout_correction.compute_rollout_correction_weights
    return compute(log_ratio_BT, batch.mask_BT, rollout_is=level, rollout_is_threshold=threshold)[0]


def compare(
    batch: PaddedBatch,
    loss: PolicyLoss,
    loss_agg_mode: VerlMode | None = None,
    loss_scale_factor: int | None = None,
    **totals,
) -> dict[str, Tensor]:
    """Returns our sums."""
    mode = loss_agg_mode or OWN_MODE[loss.variant]
    leaves = batch.leaves()
    totals = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | totals
    data = {name: tensordict.NonTensorData(value) for name, value in totals.items()}
    data |= {
        "response_mask": batch.mask_BT,
        "old_log_probs": batch.old_BT,
        "advantages": batch.advantage_B.unsqueeze(1).expand_as(batch.old_BT),
        "ref_log_prob": batch.ref_BT,
    }
    if loss.sampling_correction != "none":
        data["rollout_is_weights"] = correction_weights(loss, batch)
    theirs, _ = verl_losses.ppo_loss(
        actor_config(loss, mode, loss_scale_factor),
        {"log_probs": leaves[0], "entropy": leaves[1]},
        tensordict.TensorDict(data, batch_size=[len(batch.mask_BT)]),
    )
    weights = verl_weights(
        batch.mask_BT.sum(-1),
        loss.variant,
        mode,
        response_length=MAX_LENGTH,
        loss_scale_factor=loss_scale_factor,
        **totals,
    )
    return assert_same_loss(batch, loss, batch.tokens(weights), theirs, leaves)


def make_loss(variant: str, **values) -> PolicyLoss:
    return PolicyLoss(variant, "verl", *clip_bounds(variant), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_ratios_beyond_the_clamps(variant):
    sums = compare(make_batch(3).extreme(), make_loss(variant, beta=0.3))
    assert_both_sides_clipped(variant, sums)


@pytest.mark.parametrize("totals", [{}, {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 20}])
@pytest.mark.parametrize("mode", get_args(VerlMode))
@pytest.mark.parametrize("variant", ["grpo", "gspo", "sapo"])
def test_every_aggregation(variant, mode, totals):
    loss = make_loss(variant, beta=0.3, entropy_coef=0.1)
    compare(make_batch(5), loss, mode, loss_scale_factor=32 if totals else None, **totals)


@pytest.mark.parametrize("kl_gradient", ["estimator", "k2"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl(kl, kl_gradient):
    compare(make_batch(6).extreme(), make_loss("grpo", beta=0.3, kl=kl, kl_gradient=kl_gradient))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo", "sapo"])
def test_rollout_correction(variant, mode):
    floor = 0.6 if mode.endswith("mask") else None
    batch = make_batch(8)
    batch.sampling_BT[0] -= 25.0  # log ratios beyond the clamp at 20, of tokens and sequences
    batch.sampling_BT[1] += 25.0
    loss = make_loss(variant, sampling_correction=mode, sampling_cap=1.6, sampling_floor=floor, beta=0.3)
    assert compare(batch, loss)["sampling_cut"] > 0
