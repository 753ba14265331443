"""Logits -> sampled tokens and their log-probs, and the random numbers behind them. Called by the local engine.

Shape letters: B rows, V vocabulary, P prompts, G completions of one prompt, L prompt tokens, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.types import Prompt, SamplingParams


def check_sampling(sampling: SamplingParams) -> None:
    """Raises ValueError naming the first setting that cannot be sampled with."""
    wanted = {
        "num_completions": (sampling.num_completions >= 1, ">= 1"),
        "max_new_tokens": (sampling.max_new_tokens >= 1, ">= 1"),
        "temperature": (sampling.temperature >= 0, ">= 0 (0 is greedy)"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
        "top_k": (sampling.top_k == 0 or sampling.top_k >= 2, "0 (all) or >= 2 (for greedy set temperature to 0)"),
        "repetition_penalty": (
            sampling.repetition_penalty > 0 and math.isfinite(sampling.repetition_penalty),
            "more than 0 (1 is none)",
        ),
    }
    for name, (ok, range_text) in wanted.items():
        if not ok:
            raise ValueError(f"sampling.{name} is {getattr(sampling, name)}, wanted {range_text}")


def uniforms(seed: int, prompt_index: int, num_steps: int, group_size: int) -> Tensor:
    """[S, G] float64 in [0, 1): one number per step and completion of one prompt.

    A pure function of its arguments, so how prompts are grouped into batches, or which device decodes, changes nothing.
    Made on the CPU from a Philox stream's raw words, which numpy promises never to change: 1 ms for 1,024 x 64.
    """
    stream = np.random.Philox(np.random.SeedSequence([seed % 2**128, prompt_index]))
    words = stream.random_raw(num_steps * group_size).reshape(num_steps, group_size)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


def sample_tokens(
    logits_BV: Tensor,
    uniform_B: Tensor,
    sampling: SamplingParams,
    suppressed_ids: Tensor,
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token_B int64, logprob_B float32).

    The token is drawn from softmax(logits / temperature), in transformers' order: after the repetition penalty, without
    the suppressed ids, cut to the top_k largest (and what equals the last of them), renormalised and cut to the
    smallest set whose mass reaches top_p; by inverting the cumulative distribution at `uniform_B` (float64, [0, 1)).
    Temperature 0 takes the largest logit after the penalty. The log-prob is log_softmax(logits / temperature) over ALL
    ids but the suppressed ones, before any of the rest, as the learner computes it; at temperature 0 it is that of
    temperature 1.

    Args:
        seen_BV: bool, the tokens that are penalised, see `seen_in_prompts`; None: no penalty.
    """
    scaled_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if sampling.temperature not in (0, 1):
        scaled_BV = scaled_BV / sampling.temperature
    scaled_BV = scaled_BV.index_fill(1, suppressed_ids, -torch.inf)
    allowed_BV = scaled_BV if seen_BV is None else penalised(scaled_BV, seen_BV, sampling.repetition_penalty)
    if 0 < sampling.top_k < allowed_BV.shape[1]:
        smallest_B1 = allowed_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        allowed_BV = allowed_BV.masked_fill(allowed_BV < smallest_B1, -torch.inf)
    if sampling.temperature == 0:
        token_B1 = allowed_BV.argmax(dim=-1, keepdim=True)
    elif sampling.top_p < 1:
        prob_BV, order_BV = allowed_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        mass_before_BV = prob_BV.cumsum(dim=-1, dtype=torch.float64) - prob_BV
        kept_BV = prob_BV.masked_fill(mass_before_BV >= sampling.top_p, 0)
        token_B1 = order_BV.gather(1, _invert(kept_BV, uniform_B))
    else:
        token_B1 = _invert(allowed_BV.softmax(dim=-1), uniform_B)
    logprob_B1 = scaled_BV.log_softmax(dim=-1).gather(1, token_B1)
    return token_B1.squeeze(1), logprob_B1.squeeze(1).float()


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where they are positive, multiplied with it where negative.

    Source: CTRL (1909.05858), as transformers' RepetitionPenaltyLogitsProcessor has it. A positive factor on all logits
    (a temperature) may come before or after it.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def seen_in_prompts(prompts: Sequence[Prompt], group_size: int, vocabulary_size: int, device: torch.device) -> Tensor:
    """[P * G, V] bool: the tokens of each completion's prompt, the caller adds each that is drawn."""
    seen_PV = torch.zeros(len(prompts), vocabulary_size, dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        seen_PV[index, prompt.token_ids_L] = True
    return seen_PV.to(device).repeat_interleave(group_size, dim=0)


def _invert(prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B, 1] index of the first token whose cumulative mass exceeds uniform * total; never one of mass 0.

    float64, because a float32 running sum over 152,064 tokens is off by more than many single probabilities.
    """
    mass_BV = prob_BV.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B.unsqueeze(1) * mass_BV[:, -1:]  # below the total: uniform is at most 1 - 2**-53
    last = prob_BV.shape[1] - 1  # reached only when the logits are NaN, which the engine reports
    return torch.searchsorted(mass_BV, target_B1, right=True).clamp_max(last)
