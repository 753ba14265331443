"""The objectives: per-token log-probs of a PackedBatch -> loss of this micro-batch and its statistics.

GRPO:  loss = sum_t w_t [ -min(r_t A_t, clip(r_t) A_t) + beta k3_t ],   r_t = exp(logprob_t - old_logprob_t)
SFT:   loss = sum_t w_t [ -logprob_t ]

w_t are constants of the whole optimizer step (vcr1_kernels.losses.token_weights), so micro-batches simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vcr1_kernels.losses import clipped_policy_loss, k3_kl

from vcr1_fast.config import AlgorithmConfig
from vcr1_fast.types import PackedBatch

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks


def grpo_objective(
    logprob_N: Tensor,
    entropy_N: Tensor,
    batch: PackedBatch,
    ref_logprob_N: Tensor | None,
    config: AlgorithmConfig,
) -> tuple[Tensor, Sums]:
    """The GRPO loss of one micro-batch.

    With one update per rollout the sampled tokens are exactly on-policy, so the old log-prob is the current one with
    its gradient stopped: ratio 1, and no extra forward. With more updates it is what the engine reported.

    Returns the loss (a scalar with gradient) and sums: tokens, entropy, kl, clipped_low, clipped_high, engine_gap.
    """
    device = logprob_N.device
    weight_N, advantage_N = batch.weight_N.to(device), batch.advantage_N.to(device)
    engine_logprob_N = batch.engine_logprob_N.to(device)
    old_logprob_N = logprob_N.detach() if config.minibatches_per_rollout == 1 else engine_logprob_N
    term_N, clipped = clipped_policy_loss(logprob_N, old_logprob_N, advantage_N, config.clip_low, config.clip_high)
    kl_N = torch.zeros_like(logprob_N) if ref_logprob_N is None else k3_kl(logprob_N, ref_logprob_N)
    loss = (weight_N * (term_N + config.beta * kl_N)).sum()
    sums = {
        "tokens": torch.tensor(float(logprob_N.numel()), device=device),
        "entropy": entropy_N.detach().sum(),
        "kl": kl_N.detach().sum(),
        "clipped_low": clipped.low,
        "clipped_high": clipped.high,
        "engine_gap": (logprob_N.detach() - engine_logprob_N).abs().sum(),
    }
    return loss, sums


def sft_objective(logprob_N: Tensor, entropy_N: Tensor, batch: PackedBatch) -> tuple[Tensor, Sums]:
    """Negative log-likelihood of the taught completions; the prompt has no scored rows, so it is masked already."""
    loss = -(batch.weight_N.to(logprob_N.device) * logprob_N).sum()
    sums = {
        "tokens": torch.tensor(float(logprob_N.numel()), device=logprob_N.device),
        "entropy": entropy_N.detach().sum(),
        "nll": -logprob_N.detach().sum(),
    }
    return loss, sums
