"""Loss formulas against numbers worked out by hand, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from vcr1_kernels.losses import PolicyLoss, TokenVectors, clipped_term, kl_estimate, token_weights


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradients(loss: PolicyLoss, logprob: Tensor, entropy: Tensor, tokens: TokenVectors):
    leaves = (logprob.clone().requires_grad_(), entropy.clone().requires_grad_())
    value, sums = loss(*leaves, tokens)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    assert not any(total.requires_grad for total in sums.values())
    return value.detach(), gradients[0], gradients[1], sums


def test_clipped_term_by_hand():
    # clip to [0.8, 1.28]; the gradient of a clipped token is 0, of the others -r A
    logprob = torch.log(tensor(1.5, 1.5, 0.5, 0.5, 1.1)).requires_grad_()
    advantage = tensor(2.0, -2.0, 2.0, -2.0, 1.0)
    term, counts = clipped_term(logprob.exp(), advantage, 0.2, 0.28)
    # -min(3, 2.56); -min(-3, -2.56); -min(1, 1.6); -min(-1, -1.6); -min(1.1, 1.1)
    torch.testing.assert_close(term, tensor(-2.56, 3.0, -1.0, 1.6, -1.1))
    term.sum().backward()
    torch.testing.assert_close(logprob.grad, tensor(0.0, 3.0, -1.0, 0.0, -1.1))
    assert (int(counts.low), int(counts.high)) == (1, 1)


# Three tokens of log-prob -1 and weight 1: ratios 1.5, 0.5, 1.1 and advantages 2, -1, 1; clip to [0.8, 1.2].
#   clipped     -min(3, 2.4), -min(-0.5, -0.8), -min(1.1, 1.1)            gradient -r A, or 0 where clipped
#   cispo       -1.2 2 (-1), -0.8 (-1) (-1), -1.1 1 (-1)                   gradient -clip A
#   cispo trl   min(r, 1.2): -1.2 2 (-1), -0.5 (-1) (-1), -1.1 1 (-1)      gradient -min(r, 1.2) A
#   sapo        tau 1 and 2: -4 s(0.5) 2, -2 s(-1) (-1), -4 s(0.1) 1       gradient -4 s' r A, s' = s (1 - s)
#               s(0.5) = 0.622459331, s(-1) = 0.268941421, s(0.1) = 0.524979187
CLIPPED = (-2.4 + 0.8 - 1.1, (0.0, 0.0, -1.1))
BY_HAND = {
    ("grpo", "paper"): CLIPPED,
    ("dr_grpo", "trl"): CLIPPED,
    ("bnpo", "verl"): CLIPPED,
    ("dapo", "openrlhf"): CLIPPED,
    ("cispo", "paper"): (2.4 - 0.8 + 1.1, (-2.4, 0.8, -1.1)),
    ("cispo", "trl"): (2.4 - 0.5 + 1.1, (-2.4, 0.5, -1.1)),
    ("sapo", "paper"): (-4.979674649 + 0.537882843 - 2.099916749, (-2.820044545, 0.393223866, -1.097254577)),
}


@pytest.mark.parametrize(("variant", "dialect"), list(BY_HAND))
def test_variant_by_hand(variant, dialect):
    clip_high = 1.2 if (variant, dialect) == ("cispo", "trl") else 0.2
    loss = PolicyLoss(variant, dialect, clip_high=clip_high, sapo_tau_neg=2.0)
    logprob = tensor(-1.0, -1.0, -1.0)
    old = logprob - torch.log(tensor(1.5, 0.5, 1.1))
    tokens = TokenVectors(tensor(2.0, -1.0, 1.0), tensor(1.0, 1.0, 1.0), old)
    value, gradient, _, _ = value_and_gradients(loss, logprob, tensor(0.0, 0.0, 0.0), tokens)
    want_value, want_gradient = BY_HAND[variant, dialect]
    torch.testing.assert_close(value, torch.tensor(want_value, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(gradient, tensor(*want_gradient), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dialect", ["paper", "trl", "verl", "openrlhf"])
def test_gspo_by_hand(dialect):
    # Sequence 1: ratios 1.5 and 0.6, advantage 2: r = sqrt(0.9) = 0.948683298, terms -2 r, inside [0.8, 1.2].
    # Sequence 2: ratio 0.5, advantage -1: -min(-0.5, -0.8) = 0.8, no gradient.
    # Weights 1 and 3 in sequence 1. The gradient of log r is 1/2 at each token: -(1 + 3) 2 r / 2 at both;
    # verl keeps it on its token instead: -1 2 r and -3 2 r.
    r = math.sqrt(0.9)
    logprob = tensor(-1.0, -1.0, -1.0)
    old = logprob - torch.log(tensor(1.5, 0.6, 0.5))
    tokens = TokenVectors(tensor(2.0, 2.0, -1.0), tensor(1.0, 3.0, 1.0), old, sequence_lens=(2, 1))
    value, gradient, _, sums = value_and_gradients(PolicyLoss("gspo", dialect), logprob, torch.zeros(3), tokens)
    torch.testing.assert_close(value, torch.tensor(-8 * r + 0.8, dtype=torch.float64))
    want = (-2 * r, -6 * r, 0.0) if dialect == "verl" else (-4 * r, -4 * r, 0.0)
    torch.testing.assert_close(gradient, tensor(*want))
    assert (int(sums["clipped_low"]), int(sums["clipped_high"])) == (1, 0)


@pytest.mark.parametrize(
    ("dialect", "dual_clip", "want"),
    [
        # ratios 5, 5, 1.3 and advantages -1, 1, -1; clip to [0.8, 1.2]: without dual clip 5, -1.2, 1.3
        ("paper", 3.0, [3.0, -1.2, 1.3]),
        ("verl", None, [3.0, -1.2, 1.3]),  # 3 unasked
        ("verl", math.inf, [5.0, -1.2, 1.3]),
        ("openrlhf", None, [5.0, -1.2, 1.3]),
        ("openrlhf", 1.1, [1.1, -1.2, 1.1]),
        ("trl", 3.0, [3.0, -1.2, 1.3]),
        ("trl", 1.1, [1.2, -1.1, 1.2]),  # r = min(r, 1.1) on both sides: -min(-1.1, -1.2), -min(1.1, 1.2), ...
    ],
)
def test_dual_clip_by_hand(dialect, dual_clip, want):
    logprob = torch.log(tensor(5.0, 5.0, 1.3))
    for index, expected in enumerate(want):
        weight = torch.zeros(3, dtype=torch.float64)
        weight[index] = 1.0
        tokens = TokenVectors(tensor(-1.0, 1.0, -1.0), weight, torch.zeros_like(logprob))
        value, _ = PolicyLoss("grpo", dialect, dual_clip=dual_clip)(logprob, logprob, tokens)
        assert float(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kl", "dialect", "want"),
    [
        # d = ref - logprob = 1, -12, 12
        ("k1", "paper", [-1.0, 12.0, -12.0]),
        ("k1", "openrlhf", [-1.0, 10.0, -10.0]),
        ("k2", "verl", [0.5, 72.0, 72.0]),
        ("k2", "openrlhf", [0.5, 10.0, 10.0]),
        ("k3", "trl", [math.e - 2.0, math.exp(-12.0) + 11.0, math.exp(12.0) - 13.0]),
        ("k3", "verl", [math.e - 2.0, 10.0, 10.0]),
    ],
)
def test_kl_by_hand(kl, dialect, want):
    torch.testing.assert_close(
        kl_estimate(tensor(-2.0, 0.0, -13.0), tensor(-1.0, -12.0, -1.0), kl, dialect), tensor(*want)
    )


@pytest.mark.parametrize(
    ("kl_gradient", "dialect", "want_value", "want_gradient"),
    [
        # logprob -1, ref -2: d = -1, k3 = 1/e; ratio 2
        ("estimator", "paper", 1 / math.e, 1 - 1 / math.e),
        ("ratio", "paper", 2 / math.e, 2 * (1 - 1 / math.e) + 2 / math.e),  # (k3 r)' = k3' r + k3 r
        (None, "trl", 2 / math.e, 2.0),
        (None, "verl", 1 / math.e, 1 - 1 / math.e),
        ("k2", "verl", 1 / math.e, 1.0),  # k2' = -d
        ("k2", "openrlhf", 1 / math.e, 2.0),  # -d r
    ],
)
def test_kl_gradients_by_hand(kl_gradient, dialect, want_value, want_gradient):
    logprob = tensor(-1.0)
    tokens = TokenVectors(tensor(0.0), tensor(0.0), logprob - math.log(2.0), tensor(-2.0), kl_weight_N=tensor(10.0))
    loss = PolicyLoss("grpo", dialect, beta=0.1, kl_gradient=kl_gradient)
    value, gradient, _, sums = value_and_gradients(loss, logprob, tensor(0.0), tokens)
    assert float(value) == pytest.approx(want_value, rel=1e-12)
    assert float(gradient) == pytest.approx(want_gradient, rel=1e-12)
    assert float(sums["kl"]) == pytest.approx(want_value, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "dialect", "want", "cut"),
    [
        # rho = 2, 0.5 in one sequence (product 1), 3 in another; bounds [0.75, 1.5]
        ("token_truncate", "paper", [1.5, 0.75, 1.5], 3),
        ("token_mask", "verl", [0.0, 0.0, 0.0], 3),
        ("sequence_truncate", "trl", [1.0, 1.0, 1.5], 1),
        ("sequence_mask", "trl", [1.0, 1.0, 0.0], 1),
        ("sequence_mask", "openrlhf", [2.0, 0.5, 0.0], 1),  # gated by the sequence's mean, weighed by the token
    ],
)
def test_sampling_correction_by_hand(mode, dialect, want, cut):
    loss = PolicyLoss("grpo", dialect, sampling_correction=mode, sampling_cap=1.5, sampling_floor=0.75)
    logprob = tensor(-1.0, -1.0, -1.0)
    sampling = logprob - torch.log(tensor(2.0, 0.5, 3.0))
    ones = torch.ones_like(logprob)
    tokens = TokenVectors(ones, ones, logprob, sampling_logprob_N=sampling, sequence_lens=(2, 1))
    _, gradient, _, sums = value_and_gradients(loss, logprob, ones, tokens)
    torch.testing.assert_close(gradient, -tensor(*want))  # ratio 1, advantage 1: what is left is the weight
    assert int(sums["sampling_cut"]) == cut
    assert float(sums["sampling_weight"]) == pytest.approx(sum(want))


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        ("grpo", [1 / (4 * 4), 1 / (2 * 4), 0.0, 1 / (10 * 4)]),
        ("gspo", [1 / (4 * 4), 1 / (2 * 4), 0.0, 1 / (10 * 4)]),
        ("sapo", [1 / (4 * 4), 1 / (2 * 4), 0.0, 1 / (10 * 4)]),
        ("dr_grpo", [1 / (4 * 20), 1 / (4 * 20), 0.0, 1 / (4 * 20)]),
        ("dapo", [1 / 32, 1 / 32, 0.0, 1 / 32]),
        ("cispo", [1 / 32, 1 / 32, 0.0, 1 / 32]),
        ("bnpo", [1 / 16, 1 / 16, 0.0, 1 / 16]),  # of these tokens, not of the step's 32
    ],
)
def test_token_weights_by_hand(aggregation, want):
    weights = token_weights(torch.tensor([4, 2, 0, 10]), aggregation, 4, 32, 20)
    torch.testing.assert_close(weights, tensor(*want))


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="wanted grpo, dr_grpo or dapo"):
        token_weights(torch.tensor([1]), "mean", 1, 1, 1)  # type: ignore[arg-type]


MASKED = {"sampling_correction": "token_mask", "sampling_cap": 2.0, "dialect": "openrlhf"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "ppo"}, "variant is 'ppo', wanted one of grpo"),
        ({"dialect": "slime"}, "dialect is 'slime', wanted one of paper"),
        ({"kl": "k4"}, "kl is 'k4'"),
        ({"kl_gradient": "own"}, "kl_gradient is 'own'"),
        ({"clip_low": -0.1}, "clip_low is -0.1, wanted a finite number >= 0"),
        ({"clip_high": math.inf}, "clip_high is inf"),
        ({"beta": math.nan}, "beta is nan"),
        ({"entropy_coef": math.inf}, "entropy_coef is inf"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0, wanted > 1"),
        ({"sapo_tau_neg": 0.0}, "wanted > 0"),
        ({"dialect": "openrlhf", "variant": "cispo"}, "openrlhf has no variant cispo"),
        ({"dialect": "openrlhf", "variant": "sapo"}, "openrlhf has no variant sapo"),
        ({"variant": "cispo", "dual_clip": 3.0}, "no dual_clip for cispo"),
        ({"variant": "gspo", "dialect": "verl", "dual_clip": 3.0}, "verl has no dual_clip for gspo"),
        ({"dialect": "trl", "beta": 0.1, "kl": "k1"}, "trl has no kl k1"),
        ({"dialect": "trl", "kl_gradient": "k2"}, "trl has no kl_gradient k2"),
        ({"dialect": "verl", "kl_gradient": "ratio"}, "verl has no kl_gradient ratio"),
        ({"sampling_cap": 2.0}, "sampling_correction is none"),
        ({"sampling_correction": "token_mask"}, "wanted at least one"),
        ({"sampling_correction": "token_mask", "sampling_cap": 1.0, "sampling_floor": 1.5}, "wanted 0 <= floor < cap"),
        ({"sampling_correction": "token_mask", "sampling_cap": 2.0, "dialect": "verl"}, "masks with floor and cap"),
        ({"sampling_correction": "token_mask", "sampling_cap": 2.0, "sampling_gate": "tv"}, "paper has ratio only"),
        ({"sampling_correction": "sequence_truncate", "sampling_cap": 2.0, "dialect": "openrlhf"}, "token ratios only"),
        (MASKED | {"variant": "gspo"}, "give the engine's log-probs as old_logprob_N"),
        (MASKED | {"sampling_floor": 0.1, "sampling_gate": "tv"}, "upper bound only"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**values)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (PolicyLoss(beta=0.1), "ref_logprob_N is None"),
        (PolicyLoss(sampling_correction="token_mask", sampling_cap=2.0), "sampling_logprob_N is None"),
        (PolicyLoss("gspo"), "gspo is sequence-level and sequence_lens is None"),
    ],
)
def test_missing_vectors_are_named(loss, message):
    one = tensor(1.0)
    with pytest.raises(ValueError, match=message):
        loss(one, one, TokenVectors(one, one))


def test_rows_keep_sequences_together():
    values = tensor(0, 1, 2, 3, 4, 5)
    tokens = TokenVectors(values, values, sequence_lens=(2, 0, 3, 1))
    assert tokens.rows(2, 6).sequence_lens == (3, 1)
    assert tokens.rows(2, 6).advantage_N.tolist() == [2, 3, 4, 5]
    assert tokens.rows(2, 2).sequence_lens == ()
    with pytest.raises(ValueError, match=r"cuts a sequence at 3, wanted ends of sequences, such as 2 or 5"):
        tokens.rows(2, 3)
    assert replace(tokens, sequence_lens=None).rows(2, 3).advantage_N.tolist() == [2]
    with_tensor = replace(tokens, lens_S=torch.tensor(tokens.sequence_lens))
    for start, stop in ((2, 6), (0, 5), (2, 2), (6, 6)):
        part = with_tensor.rows(start, stop)
        assert part.lens_S is not None and tuple(part.lens_S.tolist()) == part.sequence_lens


def test_which_losses_need_whole_sequences():
    assert not PolicyLoss("grpo").is_sequence_level
    assert PolicyLoss("gspo").is_sequence_level
    assert PolicyLoss(sampling_correction="sequence_mask", sampling_cap=2.0).is_sequence_level
    assert not PolicyLoss(sampling_correction="token_mask", sampling_cap=2.0).is_sequence_level


def test_sampling_gap_is_the_distance_to_the_engine_with_and_without_correction():
    logprob, ones = tensor(-1.0, -2.0), tensor(1.0, 1.0)
    tokens = TokenVectors(ones, ones, sampling_logprob_N=tensor(-1.5, -1.75))
    for loss in (PolicyLoss(), PolicyLoss(sampling_correction="token_truncate", sampling_cap=2.0)):
        assert float(loss(logprob, ones, tokens)[1]["sampling_gap"]) == pytest.approx(0.75)
    assert "sampling_gap" not in PolicyLoss()(logprob, ones, TokenVectors(ones, ones))[1]
