"""Before the first step: does the rollout engine compute what the learner computes, from the weights it was just given?

One prompt is answered shortly by each rank's engine, and the learner scores the same ids. Wrong or stale weights, other
pixels, other positions and another temperature all show, by tenths of a nat or more; two right implementations differ
by rounding only. Called by the training loop after the first push; afterwards the gap is among every step's metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.learner.sharding import World, all_max_int, on_all_ranks
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.run.telemetry import is_main_rank
from vcr1_fast.settings.config import Config, RolloutConfig
from vcr1_fast.types import Prompt, RolloutGroup, RunError

NUM_COMPLETIONS = 4
MAX_NEW_TOKENS = 16
MAX_GAP = {torch.float32: 1e-3}  # measured with SGLang on a CPU: 2e-6 to 2e-5
# bfloat16 has 8 bits: single tokens of a low probability may be off by a nat, so the mean is what is bounded.
MAX_GAP_ROUNDED = 0.1


class ParityError(RunError):
    """The engine's log-probs are not the learner's."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Of this rank: |engine - learner| over the tokens of a short answer, in nats."""

    mean_gap: float
    max_gap: float
    num_tokens: int
    max_mean_gap: float  # the bound

    def __str__(self) -> str:
        return (
            f"engine and learner differ by {self.mean_gap:.1e} nats on average and {self.max_gap:.1e} at most over "
            f"{self.num_tokens} tokens (bound of the mean: {self.max_mean_gap:g})"
        )


def check_parity(
    engine: RolloutEngine,
    policy: PolicyModel,
    prompt: Prompt | None,
    config: RolloutConfig,
    dtype: torch.dtype,
    world: World,
) -> ParityReport | None:
    """Compare both on one prompt, sampled as in the run. A collective: all ranks call it, each with a prompt;
    where one has none, nothing is compared and None given.

    `dtype`: that both compute in. Raises ParityError, with the numbers, on the rank whose mean gap is above
    `rollout.max_logprob_gap`, and OSError on the others; what the engine raises is handled in the same way.
    """
    if all_max_int(int(prompt is None), world):
        return None
    assert prompt is not None, "as on every rank"
    bound = max_mean_gap(config, dtype)
    drawn_by = config.sampling(seed=0)  # with its top_k and top_p: an engine must not renormalise what they keep
    max_new_tokens = min(MAX_NEW_TOKENS, config.max_new_tokens)
    sampling = replace(drawn_by, num_completions=NUM_COMPLETIONS, max_new_tokens=max_new_tokens)
    groups: list[RolloutGroup] = []

    def ask() -> None:
        completions = engine.generate([prompt], sampling)[0]
        groups.append(RolloutGroup(prompt, tuple(completions), engine.policy_version))

    on_all_ranks("asking the rollout engine for a short answer", ask, world)
    batch = pack(groups, [[1.0] * NUM_COMPLETIONS])
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), config.temperature)  # gathers shards: every rank is here
    gap_N = (logprob_N.float().cpu() - batch.engine_logprob_N.float().cpu()).abs()
    report = ParityReport(float(gap_N.mean()), float(gap_N.max()), gap_N.numel(), bound)

    def judge() -> None:
        if not report.mean_gap <= bound:  # NaN, too
            raise ParityError(
                f"{report}, at policy version {engine.policy_version}: what it draws would not be what is trained. "
                "Weights that did not arrive, or other pixels, positions or numerics are to blame; raise "
                "rollout.max_logprob_gap only if you know that this is rounding"
            )

    on_all_ranks("comparing the rollout engine's log-probs with the learner's", judge, world)
    return report


def warn_of_gap(step: int, metrics: Mapping[str, float], config: Config, dtype: torch.dtype) -> None:
    """A line on stderr, from rank 0, when a step's mean gap is above the bound where learner and engine had the same
    weights: an engine that went wrong in the middle of a run shows nowhere else."""
    gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    has_same_weights = config.rollout.max_policy_lag == 0 and config.algorithm.minibatches_per_rollout == 1
    bound = max_mean_gap(config.rollout, dtype)
    if has_same_weights and not gap <= bound and is_main_rank():
        print(
            f"step {step}: the engine's log-probs are {gap:.1e} nats from the learner's on average, wanted at most "
            f"{bound:g} (rollout.max_logprob_gap)",
            file=sys.stderr,
        )


def max_mean_gap(config: RolloutConfig, dtype: torch.dtype) -> float:
    """Bound of the mean |engine - learner|, nats."""
    return config.max_logprob_gap or MAX_GAP.get(dtype, MAX_GAP_ROUNDED)
