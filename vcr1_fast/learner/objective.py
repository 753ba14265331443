"""What one micro-batch minimises: a loss function of per-token log-probs, and the per-token vectors it needs.

GRPO and its variants:  `vcr1_kernels.losses.PolicyLoss`, the only place where their formulas stand
SFT:                    loss = sum_t w_t [ -logprob_t ]

w_t are constants of the whole optimizer step (vcr1_kernels.losses.token_weights), so micro-batches simply add up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from vcr1_kernels.losses import LossFunction, PolicyLoss, TokenVectors

from vcr1_fast.config import AlgorithmConfig
from vcr1_fast.types import PackedBatch

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks


class Objective(NamedTuple):
    """`loss(logprob_N, entropy_N, tokens)` is the scalar to minimise and the sums to report."""

    loss: LossFunction
    tokens: TokenVectors


class MixedPolicyLoss(PolicyLoss):
    """PolicyLoss for rows that may hold tokens which no engine drew, those of a ground truth mixed into the group.

    Where a given log-prob is NaN, the current one with its gradient stopped stands in for it. Such a token has ratio 1
    and adds nothing to sampling_gap; its gradient is weight x advantage x grad log-prob, never clipped.
    """

    def __call__(self, logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, Sums]:
        def known(given_N: Tensor | None) -> Tensor | None:
            return None if given_N is None else torch.where(given_N.isnan(), logprob_N.detach(), given_N)

        old_N, sampling_N = known(tokens.old_logprob_N), known(tokens.sampling_logprob_N)
        return super().__call__(
            logprob_N, entropy_N, replace(tokens, old_logprob_N=old_N, sampling_logprob_N=sampling_N)
        )


def policy_loss(config: AlgorithmConfig) -> PolicyLoss:
    """The settings as the loss function they describe."""
    return MixedPolicyLoss(
        config.loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        beta=config.beta,
        kl=config.kl,
        entropy_coef=config.entropy_coef,
    )


def grpo_objective(batch: PackedBatch, ref_logprob_N: Tensor | None, config: AlgorithmConfig) -> Objective:
    """The policy loss of one micro-batch.

    With one update per rollout the sampled tokens are exactly on-policy, so the old log-prob is the current one with
    its gradient stopped: ratio 1, and no extra forward. With more updates it is what the engine reported, or, for a
    ground truth mixed into the group, still the current one.

    Sums: those of `PolicyLoss`, among them tokens, entropy, kl, clipped_low, clipped_high and sampling_gap, the sum of
    |log-prob - the engine's|.
    """
    is_on_policy = config.minibatches_per_rollout == 1
    tokens = TokenVectors(
        advantage_N=batch.advantage_N,
        weight_N=batch.weight_N,
        old_logprob_N=None if is_on_policy else batch.engine_logprob_N,
        ref_logprob_N=None if ref_logprob_N is None else ref_logprob_N.cpu(),
        sampling_logprob_N=batch.engine_logprob_N,
        sequence_lens=tuple(torch.bincount(batch.sequence_N, minlength=batch.num_sequences).tolist()),
    )
    return Objective(policy_loss(config), tokens)


def negative_log_likelihood(logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, Sums]:
    """Weighted -logprob of the taught tokens; sums: tokens, entropy, nll."""
    sums = {
        "tokens": torch.tensor(float(logprob_N.numel()), device=logprob_N.device),
        "entropy": entropy_N.detach().sum(),
        "nll": -logprob_N.detach().sum(),
    }
    return -(tokens.weight_N * logprob_N).sum(), sums


def sft_objective(batch: PackedBatch) -> Objective:
    """Likelihood of the taught completions; the prompt has no scored rows, so it is masked already."""
    return Objective(negative_log_likelihood, TokenVectors(batch.advantage_N, batch.weight_N))
