"""The engine's log-probs against the learner's, for the tests with the real SGLang."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tests.rollout.test_local_engine import full_logits
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.types import Completion, Prompt, RolloutGroup

BOUND = 1e-4  # measured: 2e-6 to 2e-5, both sides in float32
# Over a whole run of the trained model. In ten runs (416 steps, two of the runs with SGLang, the others with the local
# engine) the mean gap of a step was 2e-7 to 6e-7, its largest 1e-5 in half of the steps and at most 5.4e-5; in an
# eleventh it was once 2.4e-4: single tokens that rounding changes most. Of three of 3e-5 to 5e-5 each side was 1e-5
# to 4e-5 from float64. Weights of one update ago make the mean 3e-3 to 1e-2.
RUN_MEAN_BOUND = 3e-6
RUN_BOUND = 1e-3


def check_gaps(steps: Sequence[Mapping[str, float]]) -> None:
    """Every step of a run (metrics.jsonl) has the gap that float32 leaves between engine and learner."""
    means = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    largest = [step["sampling/sampling_logp_difference/max"] for step in steps]
    assert max(means) < RUN_MEAN_BOUND, means
    assert max(largest) < RUN_BOUND, largest


def difference(
    policy: PolicyModel, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> tuple[float, float]:
    """Largest |engine - learner| over all tokens, and how much the log-probs vary at all, both in nats."""
    groups = [RolloutGroup(p, tuple(completions), 1) for p, completions in zip(prompts, answers, strict=True)]
    batch = pack(groups, [[1.0] * len(answers[0])] * len(prompts))
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), temperature)
    return float((logprob_N - batch.engine_logprob_N).abs().max()), float(batch.engine_logprob_N.std())


def is_among_the_largest(
    model: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    top_k: int,
    banned: Sequence[int],
    penalty: float = 1.0,
) -> bool:
    """Whether each token's logit is one of the top_k largest without the banned ids and after a repetition penalty, by
    a forward of the stock model; 1e-3 below them is rounding."""
    for prompt, completions in zip(prompts, answers, strict=True):
        for completion in completions:
            logits_RV = full_logits(model, prompt, completion.token_ids_R)
            for row, logits_V in enumerate(logits_RV):
                seen = torch.cat([prompt.token_ids_L, completion.token_ids_R[:row]]).unique()
                logits_V[seen] = torch.where(logits_V[seen] < 0, logits_V[seen] * penalty, logits_V[seen] / penalty)
            logits_RV[:, list(banned)] = -torch.inf
            own_R1 = logits_RV.gather(1, completion.token_ids_R[:, None])
            if bool((own_R1 < logits_RV.topk(top_k).values[:, -1:] - 1e-3).any()):
                return False
    return True


def short_and_long(make: Callable[..., Prompt]) -> list[Prompt]:
    """8, 24 and 960 video tokens; 0.7 and 0.4 seconds per grid step move the text's positions."""
    return [
        make((2, 4, 4), "when does it move", 1.0, 1),
        make((3, 8, 4), "where", 0.7, 2),
        make((40, 12, 8), "what", 0.4, 3),
    ]


def disturb(policy: PolicyModel, seed: int) -> None:
    """Every weight changes, the vision tower's too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
