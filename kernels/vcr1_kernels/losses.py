"""The policy-loss formulas, once, as torch functions of per-token vectors. Any dtype, float64 included.

    loss = sum_i weight_i s_i term_i  +  beta sum_i kl_weight_i kl_i  -  entropy_coef sum_i entropy_weight_i H_i

    ratio r_i = exp(logprob_i - old_i);  A_i advantage;  s_i rollout correction (`sampling_correction`), 1 without;
    weights: constants of the step (`loss_weights`), so micro-batches and chunks of whole sequences add up

| variant | term_i (clip = clamp(r, 1 - clip_low, 1 + clip_high)) | paper |
|---|---|---|
| grpo, dr_grpo | -min(r A, clip A); these four differ in the weights only | 2402.03300, 2503.20783 |
| bnpo, dapo | the same | documentation of TRL, 2503.14476 |
| gspo | the same with r = exp(mean of logprob - old over the sequence) | 2507.18071 |
| cispo | -sg(clip) A logprob | 2506.13585 |
| sapo | -(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg | 2511.20347 |

sg() stops the gradient. Where the trainers differ from the papers (a blank is "as paper"):

| | trl 1.16.0 | verl 0.9.1 | openrlhf 0.11.2 |
|---|---|---|---|
| names | loss_type; gspo: importance_sampling_level=sequence | vanilla, gspo, cispo, sapo | ppo, gspo; no cispo, sapo |
| logprob - old | | clamped to +-20 | clamped to +-20 |
| gspo | | r_i = sg(r) exp(logprob_i - sg(logprob_i)), log r <= 10 | |
| dual clip: min(term, -c A) where A < 0 | r <- min(r, c) before the min, both signs | default c = 3; not for gspo | |
| cispo bounds | min(r, clip_high): raw, no lower | | |
| KL estimators | k3 | k3: <= 10 | all: within +-10 |
| KL gradient | default: of kl * r, through both | own, or that of k2 ("k3+") | own, or that of k2 sg(min(r, 10)) |
| rollout correction, weights | the tables in `sampling_correction` and `loss_weights` | | |

TRL multiplies the KL by the variant's r (for gspo that of the sequence), before dual clip. Dual clip: 1912.09729; TRL's
delta: INTELLECT-2, 2505.07291; KL times r: DeepSeek-V3.2, 2512.02556; k1, k2, k3: Schulman, "Approximating KL
divergence", 2020. Sources: TRL trainer/grpo_trainer.py `_compute_loss`, verl trainer/ppo/core_algos.py, OpenRLHF
models/loss.py and models/utils.py; tests compare with each of them to 1e-12.

Shape letters: N scored tokens of all sequences (completions) one after the other.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from .loss_weights import Aggregation, LossWeights, Variant, openrlhf_weights, token_weights, trl_weights, verl_weights
from .sampling_correction import Correction, Gate, SamplingCorrection
from .sequences import sequence_mean, sequence_sum
from .token_vectors import LossFunction, TokenVectors

__all__ = [
    "Aggregation",
    "ClipCounts",
    "LossFunction",
    "LossWeights",
    "PolicyLoss",
    "TokenVectors",
    "clipped_term",
    "k3_kl",
    "kl_estimate",
    "openrlhf_weights",
    "token_weights",
    "trl_weights",
    "verl_weights",
]

Dialect = Literal["paper", "trl", "verl", "openrlhf"]
Kl = Literal["k1", "k2", "k3"]
KlGradient = Literal["estimator", "k2", "ratio"]

LOG_RATIO_LIMIT = {"verl": 20.0, "openrlhf": 20.0}  # token-level ratios; paper and trl have none
VERL_SEQUENCE_LOG_RATIO_LIMIT = 10.0
KL_LOG_RATIO_LIMIT = 20.0  # keeps exp() of k3 finite; the cap below makes it invisible in the value
KL_LIMIT = 10.0
OPENRLHF_KL_RATIO_LIMIT = 10.0
VERL_DUAL_CLIP = 3.0


@dataclass(frozen=True)
class ClipCounts:
    """How many tokens the clip cut off, as sums so that micro-batches and ranks can be added up."""

    low: Tensor  # [] tokens with ratio < 1 - clip_low and advantage < 0
    high: Tensor  # [] tokens with ratio > 1 + clip_high and advantage > 0


def clipped_term(
    ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float, ratio_cap: float | None = None
) -> tuple[Tensor, ClipCounts]:
    """Clipped surrogate of PPO with separate bounds (PPO, arXiv 1707.06347; clip-higher: DAPO, 2503.14476).

    term = -min(ratio * advantage, clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage)

    With ratio_cap the first ratio is min(ratio, ratio_cap): the dual clip of TRL.

    At ratio 1 (the on-policy case) both arguments of min are equal; the gradient of the unclipped one is taken in full,
    so d(term)/d(logprob) = -advantage exactly, whatever torch.minimum and clamp give at a tie.

    Returns the terms [N] and the number of tokens clipped on each side.
    """
    clipped_ratio_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    if ratio_cap is not None:
        ratio_N = ratio_N.clamp(max=ratio_cap)
    unclipped_N = ratio_N * advantage_N
    clipped_N = clipped_ratio_N * advantage_N
    term_N = -torch.where(clipped_N < unclipped_N, clipped_N, unclipped_N)
    return term_N, ClipCounts(
        low=((ratio_N < 1.0 - clip_low) & (advantage_N < 0)).sum(),
        high=((ratio_N > 1.0 + clip_high) & (advantage_N > 0)).sum(),
    )


def k3_kl(logprob_N: Tensor, ref_logprob_N: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), unbiased for samples of the policy and never negative.

    k3 = exp(d) - d - 1 with d = ref_logprob - logprob (Schulman, "Approximating KL divergence", 2020).
    """
    d_N = ref_logprob_N - logprob_N
    return torch.expm1(d_N) - d_N


def kl_estimate(logprob_N: Tensor, ref_logprob_N: Tensor, kl: Kl, dialect: Dialect = "paper") -> Tensor:
    """Per-token estimate of KL(policy || reference) from a sample of the policy, with d = ref_logprob - logprob.

    k1 = -d    k2 = d^2 / 2    k3 = exp(d) - d - 1       verl caps k3 at 10, OpenRLHF each of them to +-10.
    """
    d_N = ref_logprob_N - logprob_N
    if kl == "k1":
        kl_N = -d_N
    elif kl == "k2":
        kl_N = 0.5 * d_N.square()
    elif dialect in ("verl", "openrlhf"):
        kl_N = k3_kl(-d_N.clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT), torch.zeros_like(d_N))
    else:
        kl_N = k3_kl(logprob_N, ref_logprob_N)
    is_capped = dialect == "openrlhf" or (dialect == "verl" and kl == "k3")
    return kl_N.clamp(-KL_LIMIT, KL_LIMIT) if is_capped else kl_N


@dataclass(frozen=True)
class PolicyLoss:
    """A `LossFunction`: variant and dialect as values. Formulas in the module docstring.

    sums: tokens, entropy, kl, log_ratio (logprob - old), clipped_low, clipped_high; with dual clip clipped_dual; with
    the engine's log-probs sampling_gap (|logprob - engine's|), with rollout correction also sampling_weight and
    sampling_cut (tokens truncated or masked).

    Raises ValueError for values out of range, and for what the dialect does not have; TypeError for what is no number.
    """

    variant: Variant = "grpo"
    dialect: Dialect = "paper"
    clip_low: float = 0.2
    clip_high: float = 0.2
    """In TRL's cispo the raw upper bound of the ratio, such as 5.0."""
    dual_clip: float | None = None
    """None: the trainer's default (verl: 3.0 for grpo, dr_grpo, bnpo, dapo; the others: none). inf: off."""
    beta: float = 0.0
    kl: Kl = "k3"
    kl_gradient: KlGradient | None = None
    """estimator: its own. ratio: of kl * r (trl, paper). k2: that of k2, unbiased on-policy, with the value of `kl`
    (verl, openrlhf). None: ratio for trl, else estimator."""
    entropy_coef: float = 0.0
    sampling_correction: Correction = "none"
    sampling_cap: float | None = None
    sampling_floor: float | None = None
    sampling_gate: Gate = "ratio"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05

    def __post_init__(self) -> None:
        choices = {"variant": Variant, "dialect": Dialect, "kl": Kl, "sampling_correction": Correction}
        choices |= {"sampling_gate": Gate} | ({"kl_gradient": KlGradient} if self.kl_gradient is not None else {})
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted one of {', '.join(get_args(choice))}")
        numbers = ("clip_low", "clip_high", "beta", "entropy_coef", "sapo_tau_pos", "sapo_tau_neg")
        for name in numbers:
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name} is {getattr(self, name)!r}, wanted a number")
        for name in ("clip_low", "clip_high", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a finite number >= 0")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef is {self.entropy_coef}, wanted a finite number")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip is {self.dual_clip}, wanted > 1 (a ratio of 1 must never be clipped)")
        if not (self.sapo_tau_pos > 0 and self.sapo_tau_neg > 0):
            raise ValueError(f"sapo_tau_pos, sapo_tau_neg are {self.sapo_tau_pos}, {self.sapo_tau_neg}, wanted > 0")
        self._refuse_what_the_dialect_lacks()
        self._correction.check(self.variant)
        if type(self) is PolicyLoss:  # text goes into a compiled graph; objects, such as a subclass may hold, do not
            object.__setattr__(self, "_settings", json.dumps(asdict(self), default=float))

    def _refuse_what_the_dialect_lacks(self) -> None:
        is_clipped = self.variant not in ("cispo", "sapo")
        lacks = {
            f"variant {self.variant}": self.dialect == "openrlhf" and not is_clipped,
            f"dual_clip for {self.variant}": self.dual_clip is not None
            and (not is_clipped or (self.dialect == "verl" and self.variant == "gspo")),
            f"kl {self.kl}": self.dialect == "trl" and self.beta > 0 and self.kl != "k3",
            "kl_gradient k2": self.kl_gradient == "k2" and self.dialect in ("paper", "trl"),
            "kl_gradient ratio": self.kl_gradient == "ratio" and self.dialect in ("verl", "openrlhf"),
        }
        for what, is_lacking in lacks.items():
            if is_lacking:
                raise ValueError(f"{self.dialect} has no {what}: see the tables of vcr1_kernels.losses for what it has")

    @classmethod
    def from_settings(cls, settings: str) -> PolicyLoss:
        """The loss whose `settings` these are."""
        return cls(**json.loads(settings))

    @property
    def settings(self) -> str:
        """Its fields as JSON; a subclass has none."""
        return self.__dict__["_settings"]

    def sum_names(self, tokens: TokenVectors) -> list[str]:
        """Keys of the sums of `__call__`, in their order."""
        has_engine = tokens.sampling_logprob_N is not None
        is_corrected = has_engine and self.sampling_correction != "none"
        has_dual = self.variant not in ("cispo", "sapo") and self._dual_clip is not None
        return [
            *("clipped_low", "clipped_high"),
            *(("clipped_dual",) if has_dual else ()),
            *("tokens", "entropy", "log_ratio"),
            *(("sampling_gap",) if has_engine else ()),
            *(("sampling_weight", "sampling_cut") if is_corrected else ()),
            "kl",
        ]

    @property
    def is_sequence_level(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sequence, so that chunks must not cut one."""
        return self.variant == "gspo" or self._correction.is_sequence_level

    @property
    def _correction(self) -> SamplingCorrection:
        return SamplingCorrection(
            self.sampling_correction, self.dialect, self.sampling_cap, self.sampling_floor, self.sampling_gate
        )

    @property
    def _dual_clip(self) -> float | None:
        if self.dual_clip is None and self.dialect == "verl" and self.variant not in ("gspo", "cispo", "sapo"):
            return VERL_DUAL_CLIP
        return None if self.dual_clip is None or math.isinf(self.dual_clip) else self.dual_clip

    def __call__(self, logprob_N: Tensor, entropy_N: Tensor, tokens: TokenVectors) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar; gradients for logprob_N, and entropy_N with entropy_coef) and detached sums.

        Raises ValueError when `tokens` lacks a vector that this loss needs.
        """
        self._require_vectors(tokens)
        lens_S = tokens.lens_on(logprob_N.device) if self.is_sequence_level else None
        old_N = logprob_N.detach() if tokens.old_logprob_N is None else tokens.old_logprob_N
        ratio_N = self._ratio(logprob_N, old_N, lens_S)
        term_N, sums = self._policy_term(logprob_N, ratio_N, tokens.advantage_N)
        sums["tokens"] = torch.full_like(sums["clipped_low"], logprob_N.numel())
        sums["entropy"] = entropy_N.detach().sum()
        sums["log_ratio"] = (logprob_N.detach() - old_N).sum()
        if tokens.sampling_logprob_N is not None:
            sums["sampling_gap"] = (logprob_N.detach() - tokens.sampling_logprob_N).abs().sum()
        if tokens.sampling_logprob_N is not None and self.sampling_correction != "none":
            scale_N, is_cut_N = self._correction.weights(old_N, tokens.sampling_logprob_N, lens_S)
            term_N = term_N * scale_N
            sums |= {"sampling_weight": scale_N.sum(), "sampling_cut": is_cut_N.sum()}
        loss = (tokens.weight_N * term_N).sum()
        sums["kl"] = torch.zeros_like(sums["entropy"])
        if tokens.ref_logprob_N is not None:
            kl_N = self._kl(logprob_N, old_N, tokens.ref_logprob_N, ratio_N)
            sums["kl"] = kl_N.detach().sum()
            if self.beta:
                kl_weight_N = tokens.weight_N if tokens.kl_weight_N is None else tokens.kl_weight_N
                loss = loss + self.beta * (kl_weight_N * kl_N).sum()
        if self.entropy_coef:
            entropy_weight_N = tokens.weight_N if tokens.entropy_weight_N is None else tokens.entropy_weight_N
            loss = loss - self.entropy_coef * (entropy_weight_N * entropy_N).sum()
        return loss, sums

    def zero_rows(self, tokens: TokenVectors) -> Tensor:
        """[N] bool: tokens that neither get a gradient nor change that of another, whatever the log-probs.

        A token-level loss: those whose weight or advantage is 0 and that no KL or entropy term reaches. A loss on
        sequences: those of sequences of which that holds for every token. Left out they change the sums, not the loss.
        """
        is_live_N = (tokens.weight_N != 0) & (tokens.advantage_N != 0)
        if self.beta:
            is_live_N |= (tokens.weight_N if tokens.kl_weight_N is None else tokens.kl_weight_N) != 0
        if self.entropy_coef:
            is_live_N |= (tokens.weight_N if tokens.entropy_weight_N is None else tokens.entropy_weight_N) != 0
        if self.is_sequence_level:
            self._require_lens(tokens)
            is_live_N = sequence_sum(is_live_N.to(torch.float32), tokens.lens_on(is_live_N.device)) > 0
        return ~is_live_N

    def _require_vectors(self, tokens: TokenVectors) -> None:
        if self.beta and tokens.ref_logprob_N is None:
            raise ValueError(f"beta is {self.beta} and ref_logprob_N is None: give the reference log-probs, or beta 0")
        if self.sampling_correction != "none" and tokens.sampling_logprob_N is None:
            raise ValueError(
                f"sampling_correction is {self.sampling_correction} and sampling_logprob_N is None: give the log-probs "
                "that the rollout engine reported, or sampling_correction none"
            )
        self._require_lens(tokens)

    def _require_lens(self, tokens: TokenVectors) -> None:
        if self.is_sequence_level and tokens.sequence_lens is None:
            what = "gspo" if self.variant == "gspo" else self.sampling_correction
            raise ValueError(f"{what} is sequence-level and sequence_lens is None: give the tokens of each sequence")

    def _ratio(self, logprob_N: Tensor, old_N: Tensor, lens_S: Tensor | None) -> Tensor:
        """r of the module docstring: of the token, or for gspo of its sequence."""
        log_ratio_N = logprob_N - old_N
        if self.variant != "gspo":
            limit = LOG_RATIO_LIMIT.get(self.dialect)
            return torch.exp(log_ratio_N if limit is None else log_ratio_N.clamp(-limit, limit))
        assert lens_S is not None
        mean_N = sequence_mean(log_ratio_N, lens_S)
        if self.dialect == "verl":  # value of the sequence, gradient of the token
            mean_N = (logprob_N - logprob_N.detach() + mean_N.detach()).clamp(max=VERL_SEQUENCE_LOG_RATIO_LIMIT)
        return torch.exp(mean_N)

    def _policy_term(self, logprob_N: Tensor, ratio_N: Tensor, advantage_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """term_i of the module docstring and counts of what was clipped."""
        if self.variant == "cispo":
            return self._cispo_term(logprob_N, ratio_N.detach(), advantage_N)
        if self.variant == "sapo":
            tau_N = torch.where(
                advantage_N > 0,
                torch.full_like(advantage_N, self.sapo_tau_pos),
                torch.full_like(advantage_N, self.sapo_tau_neg),
            )
            none = torch.zeros((), dtype=torch.long, device=ratio_N.device)
            gate_N = torch.sigmoid(tau_N * (ratio_N - 1.0)) * (4.0 / tau_N)
            return -gate_N * advantage_N, {"clipped_low": none, "clipped_high": none}
        dual_clip = self._dual_clip
        ratio_cap = dual_clip if self.dialect == "trl" else None
        term_N, counts = clipped_term(ratio_N, advantage_N, self.clip_low, self.clip_high, ratio_cap)
        sums = {"clipped_low": counts.low, "clipped_high": counts.high}
        if self.dialect == "trl" and dual_clip is not None:
            sums["clipped_dual"] = (ratio_N > dual_clip).sum()
        elif dual_clip is not None:
            bound_N = -dual_clip * advantage_N
            is_cut_N = (advantage_N < 0) & (term_N > bound_N)
            term_N = torch.where(is_cut_N, bound_N, term_N)
            sums["clipped_dual"] = is_cut_N.sum()
        return term_N, sums

    def _cispo_term(self, logprob_N: Tensor, ratio_N: Tensor, advantage_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-sg(bounded ratio) * advantage * logprob. TRL bounds above only, by clip_high itself, and counts A > 0."""
        if self.dialect == "trl":
            low, high = -math.inf, self.clip_high
        else:
            low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        is_high_N = (ratio_N > high) & (advantage_N > 0) if self.dialect == "trl" else ratio_N > high
        counts = {"clipped_low": (ratio_N < low).sum(), "clipped_high": is_high_N.sum()}
        return -ratio_N.clamp(low, high) * advantage_N * logprob_N, counts

    def _kl(self, logprob_N: Tensor, old_N: Tensor, ref_N: Tensor, ratio_N: Tensor) -> Tensor:
        """kl_i with the gradient chosen by kl_gradient."""
        kl_N = kl_estimate(logprob_N, ref_N, self.kl, self.dialect)
        gradient = self.kl_gradient or ("ratio" if self.dialect == "trl" else "estimator")
        if gradient == "ratio":
            return kl_N * ratio_N
        if gradient == "estimator":
            return kl_N
        k2_N = 0.5 * (logprob_N - ref_N).square()
        if self.dialect == "openrlhf":
            k2_N = k2_N * torch.exp(logprob_N - old_N).clamp(max=OPENRLHF_KL_RATIO_LIMIT).detach()
        return kl_N.detach() + (k2_N - k2_N.detach())
