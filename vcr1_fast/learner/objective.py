"""What one micro-batch minimises: a loss function of per-token log-probs, and the per-token vectors it needs.

GRPO and its variants:  `vcr1_kernels.losses.PolicyLoss`, the only place where their formulas stand
SFT:                    loss = sum_t w_t [ -logprob_t ]

w_t are constants of the whole optimizer step (vcr1_kernels.losses.token_weights), so micro-batches simply add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from vcr1_kernels.losses import LossFunction, PolicyLoss, TokenVectors

from vcr1_fast.learner.device_batch import DeviceBatch
from vcr1_fast.settings.config import AlgorithmConfig

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks


class Objective(NamedTuple):
    """`loss(logprob_N, entropy_N, tokens)` is the scalar to minimise and the sums to report."""

    loss: LossFunction
    tokens: TokenVectors
    largest_gap: Largest | None = None  # of |log-prob - the engine's|; filled in while the loss is computed


@dataclass
class Largest:
    """The largest of the values seen, None without any. A sum adds up over the chunks of a batch, this does not."""

    value: Tensor | None = None

    def see(self, values_N: Tensor) -> None:
        if values_N.numel():
            largest = values_N.detach().max()
            self.value = largest if self.value is None else torch.maximum(self.value, largest)


@dataclass(frozen=True)
class MixedPolicyLoss(PolicyLoss):
    """PolicyLoss for rows that may hold tokens which no engine drew, those of a ground truth mixed into the group.

    Where a given log-prob is NaN, the current one with its gradient stopped stands in for it. Such a token has ratio 1
    and adds nothing to sampling_gap; its gradient is weight x advantage x grad log-prob, never clipped.
    """

    largest_gap: Largest = field(default_factory=Largest, compare=False)

    def __call__(self, logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, Sums]:
        def known(given_N: Tensor | None) -> Tensor | None:
            return None if given_N is None else torch.where(given_N.isnan(), logprob_N.detach(), given_N)

        old_N, sampling_N = known(tokens.old_logprob_N), known(tokens.sampling_logprob_N)
        if sampling_N is not None:
            self.largest_gap.see((logprob_N - sampling_N).abs())
        return super().__call__(
            logprob_N, entropy_N, replace(tokens, old_logprob_N=old_N, sampling_logprob_N=sampling_N)
        )


def policy_loss(config: AlgorithmConfig) -> MixedPolicyLoss:
    """The settings as the loss function they describe."""
    return MixedPolicyLoss(
        config.loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        beta=config.beta,
        kl=config.kl,
        entropy_coef=config.entropy_coef,
        sampling_correction=config.sampling_correction,
        sampling_cap=config.sampling_cap,
        sampling_floor=config.sampling_floor,
    )


def grpo_objective(batch: DeviceBatch, ref_logprob_N: Tensor | None, config: AlgorithmConfig) -> Objective:
    """The policy loss of one micro-batch.

    `batch.old_logprob_N`: of the policy that ratios are taken against. None: the current one with its gradient stopped,
    ratio 1 and no extra forward, which is exact where the sampled tokens are on-policy. NaN in it stands for the
    current one.

    Sums: those of `PolicyLoss`, among them tokens, entropy, kl, clipped_low, clipped_high and sampling_gap, the sum of
    |log-prob - the engine's|.
    """
    loss = policy_loss(config)
    tokens = TokenVectors(
        advantage_N=batch.advantage_N,
        weight_N=batch.weight_N,
        old_logprob_N=batch.old_logprob_N,
        ref_logprob_N=ref_logprob_N,
        sampling_logprob_N=batch.engine_logprob_N,
        sequence_lens=batch.sequence_lens,
    )
    return Objective(loss, tokens, loss.largest_gap)


def negative_log_likelihood(logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, Sums]:
    """Weighted -logprob of the taught tokens; sums: tokens, entropy, nll."""
    sums = {
        "tokens": torch.full((), float(logprob_N.numel()), device=logprob_N.device),
        "entropy": entropy_N.detach().sum(),
        "nll": -logprob_N.detach().sum(),
    }
    return -(tokens.weight_N * logprob_N).sum(), sums


def sft_objective(batch: DeviceBatch) -> Objective:
    """Likelihood of the taught completions; the prompt has no scored rows, so it is masked already."""
    return Objective(negative_log_likelihood, TokenVectors(batch.advantage_N, batch.weight_N))
