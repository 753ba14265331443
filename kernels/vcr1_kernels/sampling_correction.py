"""Importance weights for the gap between trainer and rollout engine: the engine drew the tokens, not the trainer.

rho = exp(old - sampling): probability of the drawn token under the trainer's weights at rollout time over the engine's
report of it. The policy term of a token (neither KL nor entropy) is multiplied by a bounded rho, without gradient.

| | paper, trl | verl | openrlhf |
|---|---|---|---|
| token_truncate | clamp(rho, floor, cap) | min(rho, cap), no floor | clamp(rho, floor, cap) |
| token_mask | rho where inside [floor, cap], else 0 | the same | the same, or gated by a divergence |
| sequence_truncate | with the product of rho over the sequence | the same | none |
| sequence_mask | with the product of rho over the sequence | the same | rho of the token where the mean is inside |
| log rho clamped | no | to +-20 | no |
| NaN from the engine | trl: rho = 1 | stays NaN | stays NaN |

Truncation: "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al. 2025). Token mask:
IcePop (Ling team 2025). Sequence mask: "When speed kills stability" (Liu et al. 2025).

Shape letters: N tokens of all sequences one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .sequences import sequence_mean, sequence_sum

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Gate = Literal["ratio", "binary_kl", "tv"]

VERL_LOG_LIMIT = 20.0
PROBABILITY_EDGE = 1e-6  # OpenRLHF keeps probabilities this far from 0 and 1 so that the logs of binary_kl are finite


@dataclass(frozen=True)
class SamplingCorrection:
    """How rho becomes a weight. Built and checked by `losses.PolicyLoss`.

    cap, floor: bounds; None is no bound. gate: what the bounds of a mask apply to, see `_gate_statistic`.
    """

    mode: Correction
    dialect: str
    cap: float | None
    floor: float | None
    gate: Gate

    @property
    def is_sequence_level(self) -> bool:
        return self.mode.startswith("sequence")

    def check(self, variant: str) -> None:
        """Raises ValueError for bounds that make no sense and for what the dialect does not have."""
        if self.mode == "none":
            if (self.cap, self.floor, self.gate) != (None, None, "ratio"):
                raise ValueError("sampling_cap, sampling_floor or sampling_gate is set and sampling_correction is none")
            return
        bounds = f"sampling_floor, sampling_cap are {self.floor}, {self.cap}"
        if self.cap is None and self.floor is None:
            raise ValueError(f"{bounds}: wanted at least one, such as sampling_cap=2.0")
        if not 0 <= (self.floor or 0.0) < (math.inf if self.cap is None else self.cap):
            raise ValueError(f"{bounds}, wanted 0 <= floor < cap")
        is_mask = self.mode.endswith("mask")
        if self.dialect == "verl" and (self.cap is None or (self.floor is not None) != is_mask):
            raise ValueError(f"{bounds}: verl truncates with a cap alone and masks with floor and cap")
        if self.dialect != "openrlhf" and self.gate != "ratio":
            raise ValueError(f"sampling_gate is {self.gate}: {self.dialect} has ratio only")
        if self.dialect != "openrlhf":
            return
        if variant == "gspo":
            raise ValueError(
                "OpenRLHF's gspo with correction on takes its ratio against the rollout engine and weighs nothing: "
                "give the engine's log-probs as old_logprob_N and sampling_correction none"
            )
        if not is_mask and (self.is_sequence_level or self.gate != "ratio"):
            raise ValueError(f"OpenRLHF has no {self.mode} gated by {self.gate}: it truncates token ratios only")
        if self.gate != "ratio" and self.floor:
            raise ValueError(f"{bounds}: a divergence ({self.gate}) has an upper bound only")

    def weights(
        self, old_logprob_N: Tensor, sampling_logprob_N: Tensor, lens_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """([N] weights without gradient, [N] bool: truncated or masked). lens_S: for the sequence modes."""
        log_rho_N = (old_logprob_N - sampling_logprob_N).detach()
        if self.dialect == "trl":
            log_rho_N = torch.nan_to_num(log_rho_N, nan=0.0)
        if self.dialect == "openrlhf":
            weight_N = torch.exp(log_rho_N)
            statistic_N = self._gate_statistic(log_rho_N, old_logprob_N, sampling_logprob_N, lens_S)
        else:
            if self.is_sequence_level:
                assert lens_S is not None
                log_rho_N = sequence_sum(log_rho_N, lens_S)
            if self.dialect == "verl":
                log_rho_N = log_rho_N.clamp(-VERL_LOG_LIMIT, VERL_LOG_LIMIT)
            weight_N = statistic_N = torch.exp(log_rho_N)
        is_cut_N = torch.zeros_like(statistic_N, dtype=torch.bool)
        if self.floor is not None:
            is_cut_N |= statistic_N < self.floor
        if self.cap is not None:
            is_cut_N |= statistic_N > self.cap
        if self.mode.endswith("truncate"):
            return weight_N.clamp(self.floor, self.cap), is_cut_N
        return torch.where(is_cut_N, torch.zeros_like(weight_N), weight_N), is_cut_N

    def _gate_statistic(
        self,
        log_rho_N: Tensor,
        old_logprob_N: Tensor,
        sampling_logprob_N: Tensor,
        lens_S: Tensor | None,
    ) -> Tensor:
        """OpenRLHF's statistic of a token, with p = exp(sampling) and q = exp(old); for a sequence its mean.

        ratio      rho (its geometric mean over a sequence)
        binary_kl  p log(p / q) + (1 - p) log((1 - p) / (1 - q))
        tv         |p - q|
        """
        edge = PROBABILITY_EDGE
        p_N = sampling_logprob_N.detach().exp().clamp(edge, 1.0 - edge)
        q_N = old_logprob_N.detach().exp().clamp(edge, 1.0 - edge)
        if self.gate == "ratio":
            statistic_N = log_rho_N
        elif self.gate == "binary_kl":
            statistic_N = p_N * (p_N / q_N).log() + (1.0 - p_N) * ((1.0 - p_N) / (1.0 - q_N)).log()
        else:
            statistic_N = (p_N - q_N).abs()
        if self.is_sequence_level:
            assert lens_S is not None
            statistic_N = sequence_mean(statistic_N, lens_S)
        return statistic_N.exp() if self.gate == "ratio" else statistic_N
