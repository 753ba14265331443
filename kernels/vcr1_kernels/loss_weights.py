"""What one token weighs in the loss of an optimizer step: the aggregations of the papers and of the trainers.

A loss here is a sum of weight * term, and the weights are constants of the step, so micro-batches and chunks add up.

| aggregation | weight of a token | used by |
|---|---|---|
| mean over a sequence, then over sequences | 1 / (R_s S) | grpo, gspo, sapo; OpenRLHF per sample |
| mean over all tokens | 1 / (sum of R) | dapo, cispo over the step; bnpo over the micro-batch; OpenRLHF default |
| constant length | 1 / (max_tokens S) | dr_grpo |

R_s is the number of tokens of sequence s that count, S the number of sequences. The trainers differ in the details:

| | trl | verl | openrlhf |
|---|---|---|---|
| chosen by | loss_type | loss_agg_mode; sapo always per-sequence mean | loss_agg_mode; gspo always per sample |
| sequence without a counted token | counted in S | not counted in S, unless global_batch_size is given | as verl |
| KL term | as the policy term | by loss_agg_mode, also for sapo | always mean over tokens |
| entropy term | mean over the micro-batch's tokens | by loss_agg_mode, also for sapo | always mean over tokens |

verl and OpenRLHF add 1e-8 to R_s; in float32, where they compute it, no R_s >= 1 changes by it, so it is not here.

Sources: TRL 1.16.0 trainer/grpo_trainer.py; verl 0.9.1 trainer/ppo/core_algos.py and workers/utils/losses.py; OpenRLHF
0.11.2 models/loss.py and trainer/ray/ppo_actor.py. Shape letters: S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo"]
Aggregation = Variant  # each variant names the aggregation of its paper
VerlMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@dataclass(frozen=True)
class LossWeights:
    """[S] float64 each: what one token of a sequence weighs in the policy, the KL and the entropy term."""

    policy_S: Tensor
    kl_S: Tensor
    entropy_S: Tensor


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

        grpo, gspo, sapo  1 / (R_s * S)         mean over a sequence's tokens, then over sequences (DeepSeekMath,
                                                2402.03300; GSPO, 2507.18071; SAPO, 2511.20347)
        dr_grpo           1 / (max_tokens * S)  no length bias (Understanding R1-Zero, 2503.20783)
        dapo, cispo       1 / (sum of R)        mean over all tokens of the step (DAPO, 2503.14476; MiniMax-M1,
                                                2506.13585)
        bnpo              1 / (sum of R here)   mean over the tokens of this micro-batch (TRL's documentation); the only
                                                one that depends on the split

    Args:
        num_tokens_S: [S] tokens that count in each sequence; 0 is allowed and gives weight 0.
        num_step_sequences: sequences of the step over all micro-batches and ranks, dropped ones included.
        num_step_tokens: counted tokens of the step likewise.
        max_completion_tokens: the constant length of dr_grpo.

    Returns: [S] float64. Raises ValueError for another aggregation.
    """
    lengths_S = num_tokens_S.to(torch.float64)
    num_sequences = max(num_step_sequences, 1)
    if aggregation in ("grpo", "gspo", "sapo"):
        weight_S = 1.0 / (lengths_S.clamp(min=1.0) * num_sequences)
    elif aggregation == "dr_grpo":
        weight_S = torch.full_like(lengths_S, 1.0 / (max_completion_tokens * num_sequences))
    elif aggregation in ("dapo", "cispo"):
        weight_S = torch.full_like(lengths_S, 1.0 / max(num_step_tokens, 1))
    elif aggregation == "bnpo":
        weight_S = torch.ones_like(lengths_S) / lengths_S.sum().clamp(min=1.0)
    else:
        raise ValueError(f"aggregation is {aggregation!r}, wanted grpo, dr_grpo or dapo, bnpo, gspo, cispo or sapo")
    return torch.where(lengths_S > 0, weight_S, torch.zeros_like(weight_S))


def trl_weights(
    num_tokens_S: Tensor,
    variant: Variant,
    *,
    max_completion_length: int,
    num_items_in_batch: float | Tensor,
    num_processes: int = 1,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
) -> LossWeights:
    """Weights of a micro-batch as TRL's `_compute_loss` gives them in training, before ranks are averaged.

        grpo, gspo, sapo  1 / (max(R_s, 1) S GA)            bnpo     1 / (max(sum of R, 1) GA)
        dapo, cispo       P G / (max(items, 1) GA)          dr_grpo  1 / (max_completion_length S GA)
        entropy           1 / (max(sum of R, 1) GA)

    with S sequences of the micro-batch (those without a counted token too), GA gradient_accumulation_steps, P
    num_processes, G steps_per_generation, items num_items_in_batch: tokens of the generation batch over all ranks.
    In evaluation pass GA = G = 1.
    """
    lengths_S = num_tokens_S.to(torch.float64)
    accumulation = gradient_accumulation_steps
    num_sequences = lengths_S.numel()
    token_mean_S = torch.ones_like(lengths_S) / (lengths_S.sum().clamp(min=1.0) * accumulation)
    if variant in ("dapo", "cispo"):
        if isinstance(num_items_in_batch, Tensor):
            items = num_items_in_batch.to(lengths_S).clamp(min=1.0)
        else:  # as a tensor on a device it would be a copy to wait for
            items = max(float(num_items_in_batch), 1.0)
        policy_S = torch.ones_like(lengths_S) / (items / num_processes * accumulation / steps_per_generation)
    elif variant == "bnpo":
        policy_S = token_mean_S
    elif variant == "dr_grpo":
        policy_S = torch.full_like(lengths_S, 1.0 / (num_sequences * max_completion_length * accumulation))
    else:
        policy_S = 1.0 / (lengths_S.clamp(min=1.0) * num_sequences * accumulation)
    return LossWeights(policy_S, policy_S, token_mean_S)


def verl_weights(
    num_tokens_S: Tensor,
    variant: Variant,
    loss_agg_mode: VerlMode,
    *,
    response_length: int,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> LossWeights:
    """Weights of a micro-batch as verl's `agg_loss` gives them, before ranks are averaged.

        token-mean               dp_size / batch_num_tokens        token-sum  dp_size
        seq-mean-token-mean      dp_size / (R_s global_batch_size)
        seq-mean-token-sum       dp_size / global_batch_size
        seq-mean-token-sum-norm  dp_size / (global_batch_size (loss_scale_factor or response_length))

    batch_num_tokens and global_batch_size of None are counted here: the tokens, and the sequences with a token; that is
    the mean of one rank, so dp_size must be 1. response_length is the padded length of verl's tensors.
    """
    totals = (batch_num_tokens, global_batch_size)
    norm = response_length if loss_scale_factor is None else loss_scale_factor
    chosen_S = dp_size * _aggregated(num_tokens_S, loss_agg_mode, *totals, norm=norm)
    policy_S = chosen_S
    if variant == "sapo":
        policy_S = dp_size * _aggregated(num_tokens_S, "seq-mean-token-mean", *totals)
    return LossWeights(policy_S, chosen_S, chosen_S)


def openrlhf_weights(
    num_tokens_S: Tensor,
    variant: Variant,
    token_level_loss: bool = True,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> LossWeights:
    """Weights of a micro-batch as OpenRLHF's `aggregate_loss` gives them, before ranks are averaged.

    token level: dp_size / batch_num_tokens; per sample: dp_size / (R_s global_batch_size).
    A total of None is counted here (the tokens, or the sequences with a token), and dp_size then plays no part.
    """
    token_mean_S = _aggregated(num_tokens_S, "token-mean", batch_num_tokens, None)
    token_mean_S = token_mean_S * (1 if batch_num_tokens is None else dp_size)
    if token_level_loss and variant != "gspo":
        return LossWeights(token_mean_S, token_mean_S, token_mean_S)
    sample_mean_S = _aggregated(num_tokens_S, "seq-mean-token-mean", None, global_batch_size)
    sample_mean_S = sample_mean_S * (1 if global_batch_size is None else dp_size)
    return LossWeights(sample_mean_S, token_mean_S, token_mean_S)


def _aggregated(
    num_tokens_S: Tensor,
    mode: VerlMode,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    norm: float = 1.0,
) -> Tensor:
    """[S] float64 weights of one of verl's modes; totals of None are counted; 0 for a sequence with no token."""
    lengths_S = num_tokens_S.to(torch.float64)
    num_tokens = lengths_S.sum() if num_tokens is None else num_tokens
    num_sequences = (lengths_S > 0).sum() if num_sequences is None else num_sequences
    one_S = torch.ones_like(lengths_S)
    if mode == "token-sum":
        weight_S = one_S
    elif mode == "token-mean":
        weight_S = one_S / num_tokens
    elif mode == "seq-mean-token-mean":
        weight_S = one_S / lengths_S / num_sequences
    elif mode == "seq-mean-token-sum":
        weight_S = one_S / num_sequences
    elif mode == "seq-mean-token-sum-norm":
        weight_S = one_S / num_sequences / norm
    else:
        raise ValueError(f"loss_agg_mode is {mode!r}, wanted one of {', '.join(get_args(VerlMode))}")
    return torch.where(lengths_S > 0, weight_S, torch.zeros_like(weight_S))
