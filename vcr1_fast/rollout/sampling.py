"""Logits -> sampled tokens and their log-probs, and the random numbers behind them. Called by the local engine.

Shape letters: B rows, V vocabulary, G completions of one prompt, S steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.types import SamplingParams


def check_sampling(sampling: SamplingParams) -> None:
    """Raises ValueError naming the first setting that cannot be sampled with."""
    wanted = {
        "num_completions": (sampling.num_completions >= 1, ">= 1"),
        "max_new_tokens": (sampling.max_new_tokens >= 1, ">= 1"),
        "temperature": (sampling.temperature >= 0, ">= 0 (0 is greedy)"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
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
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, suppressed_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(token_B int64, logprob_B float32).

    The token is drawn from softmax(logits / temperature) without the suppressed ids, cut to the smallest set of tokens
    whose mass reaches top_p, by inverting the cumulative distribution at `uniform_B` (float64, [0, 1)). Temperature 0
    takes the largest logit. The log-prob is log_softmax(logits / temperature) over the WHOLE vocabulary, before
    anything is left out, as the learner computes it; at temperature 0 it is that of temperature 1.
    """
    scaled_BV = logits_BV.float() / (temperature or 1.0)
    allowed_BV = scaled_BV.index_fill(1, suppressed_ids, -torch.inf)
    if temperature == 0:
        token_B1 = allowed_BV.argmax(dim=-1, keepdim=True)
    elif top_p < 1:
        prob_BV, order_BV = allowed_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        mass_before_BV = prob_BV.cumsum(dim=-1, dtype=torch.float64) - prob_BV
        kept_BV = prob_BV.masked_fill(mass_before_BV >= top_p, 0)
        token_B1 = order_BV.gather(1, _invert(kept_BV, uniform_B))
    else:
        token_B1 = _invert(allowed_BV.softmax(dim=-1), uniform_B)
    logprob_B1 = scaled_BV.gather(1, token_B1) - scaled_BV.logsumexp(dim=-1, keepdim=True)
    return token_B1.squeeze(1), logprob_B1.squeeze(1)


def _invert(prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B, 1] index of the first token whose cumulative mass exceeds uniform * total; never one of mass 0.

    float64, because a float32 running sum over 152,064 tokens is off by more than many single probabilities.
    """
    mass_BV = prob_BV.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B.unsqueeze(1) * mass_BV[:, -1:]  # below the total: uniform is at most 1 - 2**-53
    last = prob_BV.shape[1] - 1  # reached only when the logits are NaN, which the engine reports
    return torch.searchsorted(mass_BV, target_B1, right=True).clamp_max(last)
