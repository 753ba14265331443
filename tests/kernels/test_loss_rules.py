"""Rules that every variant in every dialect keeps: derivative, tie at ratio 1, additivity, rows without gradient."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vcr1_kernels.losses import PolicyLoss, TokenVectors

from tests.kernels.test_losses import tensor, value_and_gradients

COMBINATIONS = [
    (variant, dialect)
    for variant in ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo")
    for dialect in ("paper", "trl", "verl", "openrlhf")
    if not (dialect == "openrlhf" and variant in ("cispo", "sapo"))
]
every_combination = pytest.mark.parametrize(("variant", "dialect"), COMBINATIONS)


def random_inputs(lens: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, TokenVectors]:
    """(logprob, entropy, tokens) in float64: advantages of sequences, weights and old log-probs of tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lens)

    def normal(size: int = num_tokens) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    logprob = -normal().abs() - 0.1
    old = logprob + 0.4 * normal()
    tokens = TokenVectors(
        advantage_N=normal(len(lens)).repeat_interleave(torch.tensor(lens, dtype=torch.long)),
        weight_N=normal().abs() + 0.1,
        old_logprob_N=old,
        ref_logprob_N=logprob + 0.5 * normal(),
        sampling_logprob_N=old + 0.3 * normal(),
        sequence_lens=lens,
        kl_weight_N=normal().abs() + 0.1,
        entropy_weight_N=normal().abs() + 0.1,
    )
    return logprob, normal().abs(), tokens


@pytest.mark.parametrize(
    ("variant", "dialect"), [pair for pair in COMBINATIONS if pair[0] != "cispo" and pair != ("gspo", "verl")]
)
def test_gradient_is_the_derivative(variant, dialect):
    """By finite differences, everything switched on. Of cispo and verl's gspo, whose ratios are constants by
    definition, test_losses.py has the gradients."""
    logprob, entropy, tokens = random_inputs((3, 1, 4), seed=2)
    loss = PolicyLoss(
        variant,
        dialect,
        dual_clip=None if variant in ("gspo", "sapo") else 2.0,
        beta=0.3,
        entropy_coef=0.2,
        sampling_correction="none" if (variant, dialect) == ("gspo", "openrlhf") else "token_truncate",
        sampling_cap=None if (variant, dialect) == ("gspo", "openrlhf") else 1.2,
    )
    value, _, entropy_gradient, _ = value_and_gradients(loss, logprob, entropy, tokens)
    assert value.dtype == torch.float64
    assert tokens.entropy_weight_N is not None
    torch.testing.assert_close(entropy_gradient, -0.2 * tokens.entropy_weight_N)
    leaves = (logprob.clone().requires_grad_(), entropy.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda logprob, entropy: loss(logprob, entropy, tokens)[0], leaves, eps=1e-7, atol=1e-6
    )


@every_combination
def test_at_ratio_one_the_gradient_is_minus_the_advantage(variant, dialect):
    """The tie of min and of clamp; exactly, but for the roundings of sapo's gate and of gspo's mean."""
    logprob = tensor(-1.0, -2.0, -0.5, -0.1)
    advantage = tensor(0.7, 0.7, -1.3, 0.0)
    clip_high = 5.0 if (variant, dialect) == ("cispo", "trl") else 0.2
    loss = PolicyLoss(variant, dialect, clip_high=clip_high)
    for old in (None, logprob):
        tokens = TokenVectors(advantage, torch.ones_like(logprob), old, sequence_lens=(2, 1, 1))
        _, gradient, _, _ = value_and_gradients(loss, logprob, logprob, tokens)
        if variant in ("gspo", "sapo"):
            torch.testing.assert_close(gradient, -advantage, rtol=1e-15, atol=0)
        else:
            assert gradient.tolist() == (-advantage).tolist()


@settings(max_examples=25)
@given(
    combination=st.sampled_from(COMBINATIONS),
    lens=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda lens: sum(lens) > 0),
    cuts=st.sets(st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_loss_and_sums_add_up_over_chunks_of_whole_sequences(combination, lens, cuts, seed):
    variant, dialect = combination
    logprob, entropy, tokens = random_inputs(tuple(lens), seed)
    corrects = (variant, dialect) != ("gspo", "openrlhf")
    loss = PolicyLoss(
        variant,
        dialect,
        beta=0.3,
        entropy_coef=0.1,
        sampling_correction="sequence_mask" if corrects else "none",
        sampling_cap=1.5 if corrects else None,
        sampling_floor=0.5 if corrects else None,
    )
    value, gradient, _, sums = value_and_gradients(loss, logprob, entropy, tokens)
    places = [0, *sorted({sum(lens[:cut]) for cut in cuts}), sum(lens)]
    parts = []
    for start, stop in pairwise(places):
        chunk = slice(start, stop)
        parts.append(value_and_gradients(loss, logprob[chunk], entropy[chunk], tokens.rows(start, stop)))
    torch.testing.assert_close(sum(part[0] for part in parts), value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-13, atol=1e-15)
    for name, total in sums.items():
        added = torch.stack([part[3][name].double() for part in parts]).sum()
        torch.testing.assert_close(added, total.double(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@every_combination
def test_zero_rows_have_no_gradient_and_can_be_left_out(variant, dialect, beta, entropy_coef):
    logprob, entropy, tokens = random_inputs((3, 1, 4, 2, 5), seed=5)
    advantage, weight = tokens.advantage_N.clone(), tokens.weight_N.clone()
    assert tokens.kl_weight_N is not None and tokens.entropy_weight_N is not None
    kl_weight, entropy_weight = tokens.kl_weight_N.clone(), tokens.entropy_weight_N.clone()
    advantage[0:3] = 0.0  # sequence 0: no advantage
    weight[8:10] = 0.0  # sequence 3: no weight; one token of sequence 4 too
    weight[12] = 0.0
    for term_weight in (kl_weight, entropy_weight):
        term_weight[0:2] = 0.0
        term_weight[8:10] = 0.0
        term_weight[12] = 0.0
    tokens = replace(
        tokens, advantage_N=advantage, weight_N=weight, kl_weight_N=kl_weight, entropy_weight_N=entropy_weight
    )
    loss = PolicyLoss(variant, dialect, beta=beta, entropy_coef=entropy_coef)
    zero = loss.zero_rows(tokens)
    reached = beta > 0 or entropy_coef > 0  # token 2 has KL and entropy weight
    if variant == "gspo":
        want = [*([] if reached else [0, 1, 2]), 8, 9]
    else:
        want = [0, 1, *([] if reached else [2]), 8, 9, 12]
    assert zero.nonzero().flatten().tolist() == want
    value, gradient, entropy_gradient, _ = value_and_gradients(loss, logprob, entropy, tokens)
    assert gradient[zero].abs().max() == 0 and entropy_gradient[zero].abs().max() == 0
    assert tokens.sequence_lens is not None
    lens = tuple(int((~part).sum()) for part in zero.split(tokens.sequence_lens))
    rest = tokens.map(lambda vector: vector[~zero], lens)
    kept = value_and_gradients(loss, logprob[~zero], entropy[~zero], rest)
    torch.testing.assert_close(kept[0], value, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(kept[1], gradient[~zero], rtol=1e-14, atol=1e-16)


@every_combination
def test_float32_in_float32_out_and_twice_the_same_bits(variant, dialect):
    logprob, entropy, tokens = random_inputs((300, 1, 200), seed=6)
    vectors: dict[str, Any] = {
        name: value.float() if isinstance(value, Tensor) else value for name, value in vars(tokens).items()
    }
    loss = PolicyLoss(variant, dialect, beta=0.1, entropy_coef=0.1)
    runs = [value_and_gradients(loss, logprob.float(), entropy.float(), TokenVectors(**vectors)) for _ in range(2)]
    assert runs[0][0].dtype == runs[0][1].dtype == torch.float32
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    exact = value_and_gradients(loss, logprob, entropy, tokens)
    torch.testing.assert_close(runs[0][1].double(), exact[1], rtol=1e-4, atol=1e-5)
