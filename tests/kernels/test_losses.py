"""Loss formulas against numbers worked out by hand."""

import math

import pytest
import torch
from vcr1_kernels.losses import clipped_policy_loss, k3_kl, token_weights


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_clipped_policy_loss_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1; clip to [0.8, 1.28]
    logprob = torch.log(tensor(1.5, 1.5, 0.5, 0.5, 1.1))
    advantage = tensor(2.0, -2.0, 2.0, -2.0, 1.0)
    term, counts = clipped_policy_loss(logprob, torch.zeros(5, dtype=torch.float64), advantage, 0.2, 0.28)
    # -min(3, 2.56); -min(-3, -2.56); -min(1, 1.6); -min(-1, -1.6); -min(1.1, 1.1)
    torch.testing.assert_close(term, tensor(-2.56, 3.0, -1.0, 1.6, -1.1))
    assert (int(counts.low), int(counts.high)) == (1, 1)


def test_clipped_tokens_have_no_gradient_and_the_others_ratio_times_advantage():
    logprob = torch.log(tensor(1.5, 1.5, 0.5, 0.5)).requires_grad_()
    advantage = tensor(2.0, -2.0, 2.0, -2.0)
    clipped_policy_loss(logprob, torch.zeros(4, dtype=torch.float64), advantage, 0.2, 0.28)[0].sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(0.0, 3.0, -1.0, 0.0))


def test_the_tie_at_ratio_one_passes_the_full_gradient():
    logprob = tensor(-1.0, -2.0).requires_grad_()
    clipped_policy_loss(logprob, logprob.detach(), tensor(0.7, -1.3), 0.2, 0.2)[0].sum().backward()
    assert logprob.grad.tolist() == [-0.7, 1.3]


def test_zero_clip_range_still_learns_on_policy():
    logprob = tensor(-1.0).requires_grad_()
    clipped_policy_loss(logprob, logprob.detach(), tensor(0.5), 0.0, 0.0)[0].sum().backward()
    assert logprob.grad.tolist() == [-0.5]


def test_k3_by_hand():
    # d = ref - logprob = 0, 1, -1
    kl = k3_kl(tensor(-1.0, -2.0, -1.0), tensor(-1.0, -1.0, -2.0))
    torch.testing.assert_close(kl, tensor(0.0, math.e - 2.0, math.exp(-1.0)))


def test_k3_gradient_is_one_minus_ratio():
    logprob = tensor(-1.0, -2.0).requires_grad_()
    k3_kl(logprob, tensor(-1.5, -1.0)).sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(1 - math.exp(-0.5), 1 - math.e))


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        ("grpo", [1 / (4 * 4), 1 / (2 * 4), 0.0, 1 / (10 * 4)]),
        ("dr_grpo", [1 / (4 * 20), 1 / (4 * 20), 0.0, 1 / (4 * 20)]),
        ("dapo", [1 / 16, 1 / 16, 0.0, 1 / 16]),
    ],
)
def test_token_weights_by_hand(aggregation, want):
    weights = token_weights(torch.tensor([4, 2, 0, 10]), aggregation, 4, 16, 20)
    torch.testing.assert_close(weights, tensor(*want))


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="wanted grpo, dr_grpo or dapo"):
        token_weights(torch.tensor([1]), "mean", 1, 1, 1)  # type: ignore[arg-type]
