"""dialect="trl" against the installed TRL: its own `GRPOTrainer._compute_loss`, run on padded float64 batches."""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from vcr1_kernels.losses import PolicyLoss, trl_weights

from tests.kernels.padded_batch import (
    MAX_LENGTH,
    PaddedBatch,
    assert_both_sides_clipped,
    assert_same_loss,
    clip_bounds,
    make_batch,
)

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed (pip install trl==1.16.0)")

GRADIENT_ACCUMULATION = 4
STEPS_PER_GENERATION = 8
PROCESSES = 2
ITEMS = 96


def trainer(loss: PolicyLoss, leaves, training: bool = True) -> SimpleNamespace:
    """What `_compute_loss` reads of a GRPOTrainer; the model's forward returns `leaves`."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (*leaves, None),
        model=SimpleNamespace(training=training),
        args=SimpleNamespace(
            use_bias_correction_kl=loss.kl_gradient != "estimator",
            delta=loss.dual_clip,
            sapo_temperature_pos=loss.sapo_tau_pos,
            sapo_temperature_neg=loss.sapo_tau_neg,
            steps_per_generation=STEPS_PER_GENERATION,
        ),
        accelerator=SimpleNamespace(
            num_processes=PROCESSES, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        loss_type="grpo" if loss.variant == "gspo" else loss.variant,
        importance_sampling_level="sequence" if loss.variant == "gspo" else "token",
        epsilon_low=loss.clip_low,
        epsilon_high=loss.clip_high,
        beta=loss.beta,
        entropy_coef=loss.entropy_coef,
        _entropy_bonus_enabled=loss.entropy_coef != 0,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=GRADIENT_ACCUMULATION,
        max_completion_length=MAX_LENGTH,
        use_vllm=loss.sampling_correction != "none",
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=loss.sampling_correction,
        vllm_importance_sampling_clip_max=loss.sampling_cap,
        vllm_importance_sampling_clip_min=loss.sampling_floor,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )


def importance_sampling_ratio(stand_in: SimpleNamespace, batch: PaddedBatch) -> torch.Tensor:
    """TRL's rollout correction: the block of `_generate_and_score_completions` that makes the ratio, run by itself."""
    source = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    blocks = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and "per_token_logps_diff =" in ast.unparse(node.body)  # type: ignore[arg-type]
    ]
    assert len(blocks) == 1
    names = {
        "self": stand_in,
        "torch": torch,
        "math": math,
        "old_per_token_logps": batch.old_BT,
        "sampling_per_token_logps": batch.sampling_BT,
        "completion_mask": batch.mask_BT.long(),
        "tool_mask": None,
    }
    exec(compile(ast.Module(body=blocks[0].body, type_ignores=[]), "trl", "exec"), names)
    return names["vllm_importance_sampling_ratio"]


def compare(batch: PaddedBatch, loss: PolicyLoss, on_policy: bool = False, training: bool = True):
    """Returns (our sums, TRL's metrics)."""
    leaves = batch.leaves()
    stand_in = trainer(loss, leaves, training)
    completion_mask_BT = (torch.arange(MAX_LENGTH) < batch.mask_BT.sum(-1, keepdim=True) + 1).long()
    inputs = {
        "prompt_ids": torch.zeros(len(batch.mask_BT), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(batch.mask_BT), 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(completion_mask_BT),
        "completion_mask": torch.ones_like(completion_mask_BT),
        "tool_mask": batch.mask_BT.long(),  # TRL multiplies the two
        "advantages": batch.advantage_B,
        "num_items_in_batch": torch.tensor(ITEMS),
        "ref_per_token_logps": batch.ref_BT,
    }
    if not on_policy:
        inputs["old_per_token_logps"] = batch.old_BT
    if loss.sampling_correction != "none":
        inputs["importance_sampling_ratio"] = importance_sampling_ratio(stand_in, batch)
    theirs = grpo_trainer.GRPOTrainer._compute_loss(stand_in, stand_in.model, inputs)
    weights = trl_weights(
        batch.mask_BT.sum(-1),
        loss.variant,
        max_completion_length=MAX_LENGTH,
        num_items_in_batch=torch.tensor(ITEMS),
        num_processes=PROCESSES,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION if training else 1,
        steps_per_generation=STEPS_PER_GENERATION if training else 1,
    )
    sums = assert_same_loss(batch, loss, batch.tokens(weights, on_policy=on_policy), theirs, leaves)
    return sums, stand_in._metrics["train" if training else "eval"]


VARIANTS = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo")


def make_loss(variant: str, **values) -> PolicyLoss:
    bounds = dict(zip(("clip_low", "clip_high"), clip_bounds(variant), strict=True))
    if variant == "cispo":
        bounds["clip_high"] += 1.0
    # TRL makes the temperatures float32, so they are numbers that float32 has
    return PolicyLoss(variant, "trl", **(bounds | {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.0625} | values))  # type: ignore


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_policy(variant):
    compare(make_batch(3), make_loss(variant, beta=0.3), on_policy=True)


@pytest.mark.parametrize("kl_gradient", [None, "estimator"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kl_and_entropy(variant, kl_gradient):
    sums, _ = compare(make_batch(4), make_loss(variant, beta=0.3, kl_gradient=kl_gradient, entropy_coef=0.1))
    assert_both_sides_clipped(variant, sums)


@pytest.mark.parametrize("dual_clip", [1.1, 1.5])  # below and above 1 + clip_high
@pytest.mark.parametrize("variant", ["grpo", "dapo", "gspo"])
def test_delta(variant, dual_clip):
    compare(make_batch(5), make_loss(variant, dual_clip=dual_clip, beta=0.3))


@pytest.mark.parametrize(("cap", "floor"), [(1.5, None), (1.5, 0.7), (None, 0.7)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("variant", ["dapo", "gspo", "cispo"])
def test_rollout_correction(variant, mode, cap, floor):
    loss = make_loss(variant, sampling_correction=mode, sampling_cap=cap, sampling_floor=floor, beta=0.3)
    sums, _ = compare(make_batch(6), loss)
    assert sums["sampling_cut"] > 0


def test_an_engine_logprob_of_nan_is_not_corrected():
    batch = make_batch(7)
    batch.sampling_BT[0, 3] = math.nan
    compare(batch, make_loss("grpo", sampling_correction="sequence_mask", sampling_cap=3.0))


@pytest.mark.parametrize("variant", ["grpo", "dapo"])
def test_evaluation_neither_accumulates_nor_splits(variant):
    compare(make_batch(8), make_loss(variant, beta=0.3), training=False)


@pytest.mark.parametrize("variant", ["grpo", "cispo"])
def test_clip_counts_are_those_of_trl(variant):
    batch = make_batch(9)
    sums, metrics = compare(batch, make_loss(variant, beta=0.2))
    num_tokens = int(sums["tokens"])
    assert num_tokens == int(batch.mask_BT.sum())
    names = {"clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean"}
    if variant == "cispo":
        names = {"clipped_high": "cispo_clip_ratio"}
    for ours, theirs in (names | {"entropy": "entropy", "kl": "kl"}).items():
        assert float(sums[ours]) > 0
        assert float(sums[ours]) / num_tokens == pytest.approx(metrics[theirs][0], rel=1e-6)
