"""The policy-loss formulas, once, as torch functions of per-token vectors. Any dtype, float64 included.

Shape letters: N scored tokens of all completions one after the other, S sequences (completions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["grpo", "dr_grpo", "dapo"]


@dataclass(frozen=True)
class ClipCounts:
    """How many tokens the clip cut off, as sums so that micro-batches and ranks can be added up."""

    low: Tensor  # [] tokens with ratio < 1 - clip_low and advantage < 0
    high: Tensor  # [] tokens with ratio > 1 + clip_high and advantage > 0


def clipped_policy_loss(
    logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, ClipCounts]:
    """Per-token clipped surrogate of PPO with separate bounds (PPO, arXiv 1707.06347; clip-higher: DAPO, 2503.14476).

    ratio = exp(logprob - old_logprob)
    term  = -min(ratio * advantage, clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage)

    At ratio 1 (the on-policy case) both arguments of min are equal; the gradient of the unclipped one is taken in full,
    so d(term)/d(logprob) = -advantage exactly, not the half that `torch.minimum` would give at a tie.

    Returns the terms [N] and the number of tokens clipped on each side.
    """
    ratio_N = torch.exp(logprob_N - old_logprob_N)
    clipped_ratio_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped_N = ratio_N * advantage_N
    clipped_N = clipped_ratio_N * advantage_N
    is_clipped_N = clipped_N < unclipped_N
    term_N = -torch.where(is_clipped_N, clipped_N, unclipped_N)
    return term_N, ClipCounts(
        low=(is_clipped_N & (advantage_N < 0)).sum(),
        high=(is_clipped_N & (advantage_N > 0)).sum(),
    )


def k3_kl(logprob_N: Tensor, ref_logprob_N: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), unbiased for samples of the policy and never negative.

    k3 = exp(d) - d - 1 with d = ref_logprob - logprob (Schulman, "Approximating KL divergence", 2020).
    """
    d_N = ref_logprob_N - logprob_N
    return torch.expm1(d_N) - d_N


def token_weights(
    num_tokens_S: Tensor,
    aggregation: Aggregation,
    num_step_sequences: int,
    num_step_tokens: int,
    max_completion_tokens: int,
) -> Tensor:
    """What one token of each sequence weighs in the loss of the whole optimizer step.

    loss = sum over tokens of weight * term, with constants of the step, so the split into micro-batches and ranks
    never changes loss or gradient:

        grpo     1 / (R_s * S)           mean over a sequence's tokens, then over sequences (DeepSeekMath, 2402.03300)
        dr_grpo  1 / (max_tokens * S)    no length bias (Understanding R1-Zero, 2503.20783)
        dapo     1 / (sum of R)          mean over all tokens of the step (DAPO, 2503.14476)

    Args:
        num_tokens_S: [S] tokens that count in each sequence; 0 is allowed and gives weight 0.
        num_step_sequences: sequences of the step over all micro-batches and ranks, dropped ones included.
        num_step_tokens: counted tokens of the step likewise.
        max_completion_tokens: the constant length of dr_grpo.

    Returns: [S] float64.
    """
    lengths_S = num_tokens_S.to(torch.float64)
    num_sequences = max(num_step_sequences, 1)
    if aggregation == "grpo":
        weight_S = 1.0 / (lengths_S.clamp(min=1.0) * num_sequences)
    elif aggregation == "dr_grpo":
        weight_S = torch.full_like(lengths_S, 1.0 / (max_completion_tokens * num_sequences))
    elif aggregation == "dapo":
        weight_S = torch.full_like(lengths_S, 1.0 / max(num_step_tokens, 1))
    else:
        raise ValueError(f"aggregation is {aggregation!r}, wanted grpo, dr_grpo or dapo")
    return torch.where(lengths_S > 0, weight_S, torch.zeros_like(weight_S))
