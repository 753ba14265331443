"""verl 0.9.1: our policy losses under their own names, and our head in place of verl's fused heads.

    actor_rollout_ref.model.external_lib=vcr1_kernels.integrations.verl
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.actor.policy_loss.loss_mode=vcr1_grpo

verl imports `external_lib` in every worker, and importing this module does it all: it registers `vcr1_grpo` (verl calls
it vanilla), `vcr1_gspo`, `vcr1_cispo` and `vcr1_sapo`, and calls `replace_head()`. verl scores every packed position;
with our head and the FSDP engine only the positions that predict a token of a response are scored.

Shape letters: B sequences, L padded response length, N tokens of all responses, T packed positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend
from ..linear_logprob import Keep, check_head_options
from ..loss_weights import Variant, verl_weights
from ..losses import LOG_RATIO_LIMIT, PolicyLoss
from ..token_vectors import TokenVectors
from .peer_version import check_version
from .score_tokens import IGNORED, score_wanted_tokens, unsupported_dtype

TESTED = ("0.9.1", "0.9.2")
LOSSES: dict[str, Variant] = {
    "vcr1_grpo": "grpo",
    "vcr1_gspo": "gspo",
    "vcr1_cispo": "cispo",
    "vcr1_sapo": "sapo",
}


@dataclass(frozen=True)
class VerlPolicyLoss:
    """One of `LOSSES` as verl calls a policy loss: everything padded to [B, L], clip ratios and totals in `config`."""

    variant: Variant

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics): verl's own value, gradient and metrics for `PolicyLoss(variant, "verl")`.

        Read from config: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, tau_neg and
        global_batch_info. rollout_is_weights multiply the policy term of their token. A micro-batch without a counted
        token gives 0 where verl's token mean gives NaN.

        Raises: ValueError without config, when several ranks share a mean whose total is not given, and for an entropy
        bonus that the replaced head gives no gradient.
        """
        if config is None:
            raise ValueError(f"the loss {self.variant} got no config, wanted verl's actor config with the clip ratios")
        mask_BL = response_mask.bool()
        lengths_B = mask_BL.sum(-1)
        weight_BL = self._weights(lengths_B, loss_agg_mode, config, mask_BL.shape[1])[:, None].to(log_prob.dtype)
        if rollout_is_weights is not None:
            weight_BL = weight_BL * rollout_is_weights
        if config.get("entropy_coeff", 0) and _replaced is not None and not _replaced.options["entropy_grad"]:
            raise ValueError(
                f"entropy_coeff is {config.entropy_coeff} and the head was replaced with entropy_grad=False, so the "
                "bonus would have no gradient: call replace_head(entropy_grad=True), or set entropy_coeff to 0"
            )
        loss_function = self._loss(config)
        tokens = TokenVectors(
            advantage_N=advantages[mask_BL],
            weight_N=weight_BL.expand_as(mask_BL)[mask_BL],
            old_logprob_N=old_log_prob[mask_BL],
            sequence_lens=tuple(lengths_B.tolist()) if loss_function.is_sequence_level else None,
        )
        logprob_N = log_prob[mask_BL]
        loss, sums = loss_function(logprob_N, torch.zeros_like(logprob_N), tokens)
        return loss, self._metrics(logprob_N.detach() - old_log_prob[mask_BL], sums)

    def _loss(self, config: Any) -> PolicyLoss:
        low, high = (getattr(config, f"clip_ratio_{side}") for side in ("low", "high"))
        dual_clip = config.get("clip_ratio_c", 3.0) if self.variant == "grpo" else None
        return PolicyLoss(
            self.variant,
            "verl",
            clip_low=config.clip_ratio if low is None else low,
            clip_high=config.clip_ratio if high is None else high,
            dual_clip=dual_clip,
            sapo_tau_pos=config.get("tau_pos", 1.0),
            sapo_tau_neg=config.get("tau_neg", 1.05),
        )

    def _weights(self, lengths_B: Tensor, loss_agg_mode: str, config: Any, response_length: int) -> Tensor:
        totals = dict(config.global_batch_info)
        mode = "seq-mean-token-mean" if self.variant == "sapo" else loss_agg_mode
        needed = {"token-mean": "batch_num_tokens"}.get(mode, "global_batch_size")
        if mode != "token-sum" and totals.get("dp_size", 1) > 1 and totals.get(needed) is None:
            raise ValueError(f"{mode} over {totals['dp_size']} ranks needs {needed} in config.global_batch_info")
        weights = verl_weights(lengths_B, self.variant, loss_agg_mode, response_length=response_length, **totals)  # pyright: ignore[reportArgumentType]
        return weights.policy_S

    def _metrics(self, log_ratio_N: Tensor, sums: dict[str, Tensor]) -> dict[str, float]:
        limit = math.inf if self.variant == "gspo" else LOG_RATIO_LIMIT["verl"]
        clipped = sums["clipped_low"] + sums["clipped_high"]
        dual = sums.get("clipped_dual", torch.zeros_like(clipped))
        kl = -log_ratio_N.clamp(-limit, limit).sum()
        totals = torch.stack([clipped.to(kl.dtype), kl, dual.to(kl.dtype)]) / max(log_ratio_N.numel(), 1)
        return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), totals.tolist(), strict=True))


def register_losses() -> None:
    """Puts `LOSSES` into verl's registry of policy losses; safe to repeat."""
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for name, variant in LOSSES.items():
        core_algos.register_policy_loss(name)(VerlPolicyLoss(variant))


@dataclass
class ReplacedHead:
    """What `replace_head` put in place. `.undo()` restores verl's functions.

    Attributes: fused_calls, how often our head ran; verl_calls, reason -> how often verl's own function ran.
    """

    options: dict[str, Any]
    fused_calls: int = 0
    verl_calls: dict[str, int] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = owner.__dict__[name]
        setattr(owner, name, wrap(original))
        self._undo.append(lambda: setattr(owner, name, original))

    def undo(self) -> None:
        global _replaced
        if _replaced is self:
            _replaced = None
        while self._undo:
            self._undo.pop()()

    def score(self, hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self.fused_calls += 1
        return score_wanted_tokens(hidden, weight_VD, target, temperature, self.options)

    def fall_back(self, reason: str) -> None:
        if reason not in self.verl_calls:
            warnings.warn(f"verl's own head scores these tokens: {reason}", stacklevel=3)
        self.verl_calls[reason] = self.verl_calls.get(reason, 0) + 1


_replaced: ReplacedHead | None = None


def replace_head(
    *,
    keep: Keep = "auto",
    entropy_grad: bool = True,
    responses_only: bool = True,
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> ReplacedHead:
    """Make verl's fused forwards (`use_fused_kernels=True`, any `impl_backend`) score with `fused_linear_logprob`.

    Replaces `FusedLinearForPPO.forward` (backends torch and liger), `linear_cross_entropy` (backend triton) and, for
    responses_only, wraps the FSDP engine's `prepare_model_inputs`. A second call replaces the first.

    Args:
        keep: as in `fused_linear_logprob`. 3 matrix products instead of 4 need entropy_grad=False.
        entropy_grad: False where `entropy_coeff` is 0: verl then still asks for a gradient of the entropy, all zeros.
            With another `entropy_coeff` our losses raise then; verl's own losses lose the bonus's gradient silently.
        responses_only: give the positions that predict no response token the target -100, so that the head skips them;
            their log-prob and entropy come out 0, and verl reads neither. Left alone under Ulysses sequence parallel.
        chunk_rows, backend: as in `fused_linear_logprob`.

    Returns: the handle, for `.undo()` and counts.

    Raises: ImportError for a verl that is not 0.9.1; ValueError for keep="probs" with entropy_grad.
    """
    global _replaced
    check_version("verl", *TESTED)
    check_head_options(chunk_rows, backend, keep)
    if keep == "probs" and entropy_grad:
        raise ValueError("keep='probs' has no gradient of the entropy: with entropy_coeff 0 pass entropy_grad=False")
    if _replaced is not None:
        _replaced.undo()
    options = {"keep": keep, "entropy_grad": entropy_grad, "chunk_rows": chunk_rows, "backend": backend}
    head = _replaced = ReplacedHead(options)
    torch_head = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    head.replace(torch_head, "forward", lambda original: _module_forward(head, original))
    triton_head = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    head.replace(triton_head, "linear_cross_entropy", lambda original: _linear_cross_entropy(head, original))
    if responses_only:
        engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
        head.replace(engine, "prepare_model_inputs", _prepare_model_inputs)
    return head


def _module_forward(head: ReplacedHead, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        reason = unsupported_dtype(hidden_states)
        if reason is not None:
            head.fall_back(reason)
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        return head.score(hidden_states, vocab_weights, input_ids.to(torch.int64), temperature)

    return forward


def _linear_cross_entropy(head: ReplacedHead, original: Callable[..., Any]) -> Callable[..., Any]:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        reason = unsupported_dtype(hidden)
        if dist_process_group is not None:
            reason = "the vocabulary is split over ranks"
        elif reduction.lower() != "none":
            reason = f"reduction {reduction}"
        if reason is not None:
            head.fall_back(reason)
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        return head.score(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1).long(), temperature)

    return linear_cross_entropy


def _prepare_model_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = original(self, micro_batch)
        labels_1T = model_inputs.get("shift_labels")
        if labels_1T is not None and "responses" in micro_batch and not self.use_ulysses_sp:
            wanted_T = response_positions(micro_batch, labels_1T.shape[-1])
            if wanted_T is not None:
                model_inputs["shift_labels"] = labels_1T.masked_fill(~wanted_T, IGNORED)
        return model_inputs, output_args

    return prepare_model_inputs


def response_positions(micro_batch: Any, num_positions: int) -> Tensor | None:
    """[T] bool: packed positions whose log-prob verl reads, one before each response token; None where it is unknown.

    Sequence i with r_i response tokens ends at offset o_i: positions o_i - r_i - 1 to o_i - 2.
    """
    responses, mask = micro_batch["responses"], micro_batch.get("attention_mask", None)
    if responses.is_nested:
        num_response_B = responses.offsets().diff()
    elif mask is not None and not mask.is_nested:  # padded [B, L], the mask over prompt and response
        num_response_B = mask[:, mask.shape[1] - responses.shape[1] :].sum(-1)
    else:
        return None
    end_B = micro_batch["input_ids"].offsets()[1:]
    # +1 where a stretch starts and -1 where it ends: the running sum is 1 inside
    edge_T = torch.zeros(num_positions + 1, dtype=torch.long, device=end_B.device)
    edge_T.index_add_(0, end_B - num_response_B - 1, torch.ones_like(end_B, dtype=torch.long))
    edge_T.index_add_(0, end_B - 1, -torch.ones_like(end_B, dtype=torch.long))
    return edge_T.cumsum(0)[:num_positions] > 0


check_version("verl", *TESTED)
register_losses()
head: ReplacedHead = replace_head()
"""What importing this module put in place."""
