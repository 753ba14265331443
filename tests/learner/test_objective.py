"""The loss of rows that hold a ground truth, for which there are no engine log-probs."""

import dataclasses
import math

import pytest
import torch
from vcr1_kernels.losses import TokenVectors

from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.objective import grpo_objective, policy_loss
from vcr1_fast.learner.packing import pack
from vcr1_fast.settings.config import AlgorithmConfig, ModelConfig

NAN = float("nan")


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_row_with_a_ground_truth_learns_as_if_its_old_log_probs_were_the_current_ones(
    make_model, make_group, loss, kernels, minibatches
):
    group = make_group(3, (4, 6, 5), (-0.5, -0.5, 1.0))
    truth = dataclasses.replace(group.completions[2], logprobs_R=torch.full((5,), NAN))
    mixed = dataclasses.replace(group, completions=(*group.completions[:2], truth))
    algorithm = AlgorithmConfig(loss=loss, minibatches_per_rollout=minibatches)
    results = []
    for members in (mixed, group):
        hf = make_model()
        policy = PolicyModel(hf, ModelConfig(kernels=kernels), torch.float32)
        batch = pack([members], [[0.2, 0.1, 0.3]])
        if members is group:  # the same by hand: what the policy gives its third completion now
            current_N = policy(policy.device_batch(batch), 1.0)[0].detach()
            engine_N = torch.where(batch.sequence_N == 2, current_N, batch.engine_logprob_N)
            batch = dataclasses.replace(batch, engine_logprob_N=engine_N)
        old_N = batch.engine_logprob_N if minibatches > 1 else None
        row = policy.device_batch(dataclasses.replace(batch, old_logprob_N=old_N))
        value, sums = policy(row, 1.0, grpo_objective(row, None, algorithm))
        value.backward()
        gradient = hf.model.language_model.layers[0].self_attn.q_proj.weight.grad
        results.append((value.item(), float(sums["sampling_gap"]), gradient))
    (got, got_gap, got_gradient), (want, want_gap, want_gradient) = results
    assert math.isfinite(got) and got == pytest.approx(want, rel=1e-5)
    assert got_gap == pytest.approx(want_gap, rel=1e-4)
    assert (got_gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()
    assert want_gradient.norm() > 0


def test_importance_weights_scale_the_policy_term():
    """One update per rollout: the ratio is 1, and rho = e^(current - engine) multiplies it, cut at the cap."""
    logprob_N = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    tokens = TokenVectors(
        advantage_N=torch.ones(3),
        weight_N=torch.ones(3),
        sampling_logprob_N=torch.tensor([-1.0, -1.2, -3.0]),  # rho 1, e^0.2 and e^2, which is cut at 2
    )
    config = AlgorithmConfig(sampling_correction="token_truncate", sampling_cap=2.0)
    loss, sums = policy_loss(config)(logprob_N, torch.zeros(3), tokens)
    loss.backward()
    assert logprob_N.grad is not None
    assert logprob_N.grad.tolist() == pytest.approx([-1.0, -math.exp(0.2), -2.0])
    assert (float(sums["sampling_cut"]), float(sums["sampling_weight"])) == pytest.approx((1.0, 3.0 + math.exp(0.2)))


def test_the_largest_gap_is_over_all_chunks():
    objective = policy_loss(AlgorithmConfig())
    for engine in (-1.5, -1.1, NAN):  # a token that no engine drew has no gap
        tokens = TokenVectors(torch.ones(1), torch.ones(1), sampling_logprob_N=torch.tensor([engine]))
        objective(torch.tensor([-1.0]), torch.zeros(1), tokens)
    assert objective.largest_gap.value is not None and float(objective.largest_gap.value) == pytest.approx(0.5)
    assert policy_loss(AlgorithmConfig()).largest_gap.value is None  # each objective has its own
