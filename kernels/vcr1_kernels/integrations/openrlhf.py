"""OpenRLHF 0.11.2: our head inside `Actor.forward`, and a `PolicyLoss` with its arguments and results.

    from vcr1_kernels.integrations import openrlhf as vcr1_openrlhf
    vcr1_openrlhf.use_fused_head()          # in each process that holds an Actor

OpenRLHF's actor makes float32 logits of every position, then reads the log-probs of the action tokens. Here the
model's `lm_head` scores the action tokens itself and no logits exist. The head runs as the forward of that module, so
what DeepSpeed ZeRO-3, PEFT or FSDP hang on it (gathering its weight, for one) works as before.

Shape letters: B sequences, L their length, A padded number of action tokens, N counted tokens, D hidden size.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import losses
from ..backend import Backend
from ..linear_logprob import check_head_options
from ..loss_weights import Variant, openrlhf_weights
from ..sampling_correction import Correction, Gate, SamplingCorrection
from ..token_vectors import TokenVectors
from .peer_version import check_version
from .score_tokens import IGNORED, score_wanted_tokens, unsupported_dtype

TESTED = ("0.11.2", "0.11.3")
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
PolicyLossResult = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class PolicyLoss:
    """OpenRLHF's `PolicyLoss` on `vcr1_kernels.losses.PolicyLoss(dialect="openrlhf")`: same arguments, same results.

    Raises: ValueError for values out of range and combinations OpenRLHF does not have.
    """

    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float | None = None
    token_level_loss: bool = True
    policy_loss_type: Literal["ppo", "gspo"] = "ppo"
    is_correction_level: Literal["off", "token", "seq"] = "off"
    is_correction_mode: Literal["mask", "clip"] = "mask"
    is_correction_gating: Gate = "ratio"
    is_correction_threshold: tuple[float, float] = (0.5, 5.0)

    def __post_init__(self) -> None:
        variants: dict[str, Variant] = {"ppo": "grpo", "gspo": "gspo"}
        if self.policy_loss_type not in variants:
            raise ValueError(f"policy_loss_type is {self.policy_loss_type!r}, wanted ppo or gspo")
        self._variant: Variant = variants[self.policy_loss_type]
        if self._variant == "gspo":
            self.token_level_loss = False
        correction = self._correction_mode()
        low, high = self.is_correction_threshold
        is_weighed = correction != "none" and self._variant == "grpo"  # gspo takes its ratio to the rollout instead
        gate = self.is_correction_gating
        bounds: dict[str, Any] = {"sampling_cap": high, "sampling_floor": low, "sampling_gate": gate}
        self._loss = losses.PolicyLoss(
            self._variant,
            "openrlhf",
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            sampling_correction=correction if is_weighed else "none",
            **(bounds if is_weighed else {}),
        )
        self._gate = SamplingCorrection(correction, "openrlhf", high, low, gate)
        if correction != "none":
            self._gate.check("grpo")

    def _correction_mode(self) -> Correction:
        modes: dict[tuple[str, str], Correction] = {
            ("token", "mask"): "token_mask",
            ("token", "clip"): "token_truncate",
            ("seq", "mask"): "sequence_mask",
        }
        if self.is_correction_level == "off":
            return "none"
        chosen = (self.is_correction_level, self.is_correction_mode)
        if chosen not in modes:
            raise ValueError(
                f"is_correction_level, is_correction_mode are {chosen}, wanted off or one of {list(modes)}"
            )
        return modes[chosen]

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> PolicyLossResult:
        """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio) of [B, A] tensors; the last two None without correction.

        Raises: ValueError when the correction is on and rollout_log_probs are not given. No counted token at all gives
        zeros where OpenRLHF gives NaN, and a sequence without one counts as not filtered.
        """
        mask_BA = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        is_corrected = self.is_correction_level != "off"
        if is_corrected and rollout_log_probs is None:
            raise ValueError(
                f"is_correction_level is {self.is_correction_level} and rollout_log_probs is None: give them"
            )
        lengths_B = mask_BA.sum(-1)
        weights = openrlhf_weights(
            lengths_B,
            self._variant,
            self.token_level_loss,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
        )
        weight_BA = weights.policy_S[:, None].to(log_probs.dtype).expand_as(mask_BA)
        rollout_N = None if rollout_log_probs is None else rollout_log_probs[mask_BA]
        logprob_N, old_N = log_probs[mask_BA], old_log_probs[mask_BA]
        is_sequence_level = self._variant == "gspo" or self._gate.is_sequence_level
        lens = tuple(lengths_B.tolist()) if is_sequence_level else None
        tokens = TokenVectors(
            advantage_N=advantages[mask_BA],
            weight_N=weight_BA[mask_BA],
            old_logprob_N=rollout_N if is_corrected and self._variant == "gspo" else old_N,
            sampling_logprob_N=rollout_N,
            sequence_lens=lens,
        )
        loss, sums = self._loss(logprob_N, torch.zeros_like(logprob_N), tokens)
        num_tokens = max(logprob_N.numel(), 1)
        clip_ratio = (sums["clipped_low"] + sums["clipped_high"]) / num_tokens
        ppo_kl = (old_N - logprob_N.detach()).sum() / num_tokens
        if not is_corrected or rollout_N is None or self._variant == "gspo":
            return loss, clip_ratio, ppo_kl, None, None
        vllm_kl = (rollout_N - old_N).sum() / num_tokens
        if not self._gate.is_sequence_level:
            return loss, clip_ratio, ppo_kl, vllm_kl, sums["sampling_cut"] / num_tokens
        _, is_cut_N = self._gate.weights(old_N, rollout_N, lengths_B)
        return loss, clip_ratio, ppo_kl, vllm_kl, _share_of_rows(mask_BA, is_cut_N)

    __call__ = forward


def _share_of_rows(mask_BA: Tensor, is_cut_N: Tensor) -> Tensor:
    """Share of the B rows of which any of the N tokens under the mask is cut."""
    return torch.zeros_like(mask_BA).masked_scatter(mask_BA, is_cut_N).any(-1).float().mean()


@dataclass
class FusedActorHead(AbstractContextManager["FusedActorHead"]):
    """What `use_fused_head` put in place. `.undo()`, or `with`, restores OpenRLHF's `Actor.forward`.

    Attributes: fused_calls, how often our head ran; openrlhf_calls, reason -> how often OpenRLHF's forward ran whole.
    """

    options: dict[str, Any]
    original: Any
    fused_calls: int = 0
    openrlhf_calls: dict[str, int] = field(default_factory=dict)

    def forward(
        self,
        actor: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        **call: Any,
    ) -> Any:
        """`Actor.forward` with the same arguments and results, except: `output.logits` is None, and `output.entropy` is
        0 where action_mask is 0 (OpenRLHF multiplies it by that mask)."""
        reason = _why_not(actor, action_mask, call)
        if reason is not None:
            if reason not in self.openrlhf_calls:
                warnings.warn(f"OpenRLHF's own Actor.forward runs: {reason}", stacklevel=3)
            self.openrlhf_calls[reason] = self.openrlhf_calls.get(reason, 0) + 1
            return self.original(actor, sequences, action_mask, attention_mask, return_output, **call)
        with_entropy = bool(call.pop("return_entropy", False))
        if with_entropy and not return_output:
            raise ValueError("return_entropy without return_output: the entropy comes in the output")
        for name in ("allgather_logits", "return_logprobs", "packed_seq_lens"):
            call.pop(name, None)
        inputs, target, unpack = _lay_out(actor, sequences, action_mask, attention_mask, call)
        options = {**self.options, "entropy_grad": with_entropy}
        with _scoring_head(actor.model, target, actor.temperature, options) as scored:
            output = actor.model(**inputs)
        self.fused_calls += 1
        output["logits"] = None
        logprob_BL, entropy_BL = (unpack(values)[:, :-1] for values in scored)
        if with_entropy:
            output.entropy = entropy_BL
        if action_mask is not None:
            logprob_BL = logprob_BL[:, -action_mask.shape[1] :] * action_mask.float()
        return (logprob_BL, output) if return_output else logprob_BL

    def undo(self) -> None:
        actor_class = importlib.import_module("openrlhf.models.actor").Actor
        if getattr(actor_class.forward, "fused_head", None) is self:
            actor_class.forward = self.original

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fused_head(*, chunk_rows: int | None = None, backend: Backend = "auto") -> FusedActorHead:
    """Make every `Actor` of this process score with `fused_linear_logprob`. A second call replaces the first.

    Returns: the handle: `.undo()`, or `with use_fused_head(): ...`. Raises ImportError for any OpenRLHF but 0.11.2.
    """
    check_version("openrlhf", *TESTED)
    check_head_options(chunk_rows, backend)
    actor_class = importlib.import_module("openrlhf.models.actor").Actor
    previous = getattr(actor_class.forward, "fused_head", None)
    if previous is not None:
        previous.undo()
    head = FusedActorHead({"chunk_rows": chunk_rows, "backend": backend}, actor_class.forward)

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return head.forward(self, *arguments, **named)

    forward.fused_head = head  # pyright: ignore[reportFunctionMemberAccess]
    actor_class.forward = forward
    return head


def _why_not(actor: Any, action_mask: Tensor | None, call: dict[str, Any]) -> str | None:
    """Why a call needs OpenRLHF's own forward; None where ours gives the same."""
    if action_mask is None and not call.get("return_logprobs"):
        return "the logits themselves are asked for"
    model = _language_model(actor.model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"the head is a {type(head).__name__}, not a plain linear layer"
    if head.bias is not None:
        return "the head has a bias"
    text_config = model.config.get_text_config()
    changes = [name for name in LOGIT_CHANGES if getattr(text_config, name, None) not in (None, 1.0)]
    if changes:
        return f"the model changes its logits after the head ({', '.join(changes)})"
    return unsupported_dtype(head.weight)


def _language_model(model: nn.Module) -> Any:
    """The Hugging Face model inside what DeepSpeed or PEFT made of it; their own `config` is another thing."""
    base = importlib.import_module("transformers").PreTrainedModel
    found = next((module for module in model.modules() if isinstance(module, base)), None)
    if found is None:
        raise TypeError(f"the actor's model is a {type(model).__name__} with no transformers model inside, wanted one")
    return found


def _lay_out(
    actor: Any,
    sequences_BL: Tensor,
    action_mask_BA: Tensor | None,
    attention_mask_BL: Tensor | None,
    call: dict[str, Any],
) -> tuple[dict[str, Any], Tensor, Any]:
    """(model inputs, targets of its positions, a function that brings per-position values back to [B, L]).

    The target of a position is the next token, and -100 where that is no action token. `call` holds ring_attn_group and
    the multi-modal inputs.
    """
    ring_attn_group = call.pop("ring_attn_group", None)
    target_BL = sequences_BL.roll(-1, 1)
    target_BL[:, -1] = IGNORED
    if action_mask_BA is not None:
        wanted_BL = torch.zeros_like(sequences_BL, dtype=torch.bool)
        wanted_BL[:, -action_mask_BA.shape[1] - 1 : -1] = action_mask_BA.bool()
        target_BL = target_BL.masked_fill(~wanted_BL, IGNORED)
    if not actor.packing_samples:
        positions: dict[str, Any] = {"position_ids": None}
        if getattr(actor, "is_vlm", False):
            call |= _token_kinds(actor, sequences_BL, call)
        else:
            assert attention_mask_BL is not None
            counted_BL = attention_mask_BL.long().cumsum(-1) - 1
            positions = {"position_ids": counted_BL.masked_fill(attention_mask_BL == 0, 1)}
        inputs = {"input_ids": sequences_BL, "attention_mask": attention_mask_BL, **positions, **call}
        return inputs, target_BL, lambda values_BL: values_BL
    symbols = importlib.import_module("openrlhf.models.actor")
    tokens, position_ids, target, pad_len, indices = symbols.unpad_and_slice_tensor(
        sequences_BL, attention_mask_BL, ring_attn_group
    )
    if ring_attn_group is None:  # ring attention deals the positions out to ranks: there every one is scored
        target = target_BL.reshape(-1)[indices].unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": None, "position_ids": position_ids, **call}
    batch, length = sequences_BL.shape
    return (
        inputs,
        target,
        lambda values: symbols.gather_and_pad_tensor(values, ring_attn_group, pad_len, indices, batch, length),
    )


def _token_kinds(actor: Any, sequences_BL: Tensor, mm_inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a vision model needs to know of each token: 0 text, 1 image, 2 video, under the name of its family."""
    if not mm_inputs:
        return {}
    config = actor._vlm_config
    kinds_BL = (sequences_BL == config.image_token_id).to(torch.int32)
    video_id = getattr(config, "video_token_id", None)
    if video_id is not None:
        kinds_BL = kinds_BL.masked_fill(sequences_BL == video_id, 2)
    return {"mm_token_type_ids" if "image_grid_thw" in mm_inputs else "token_type_ids": kinds_BL}


@contextmanager
def _scoring_head(model: Any, target: Tensor, temperature: float, options: dict[str, Any]) -> Iterator[list[Tensor]]:
    """While open, the head of `model` returns log-probs [B, L, 1] as logits; those and entropies go into the list."""
    head = _language_model(model).get_output_embeddings()
    scored: list[Tensor] = []

    def forward(hidden_BLD: Tensor) -> Tensor:
        scored.extend(score_wanted_tokens(hidden_BLD, head.weight, target, temperature, options))
        return scored[0].unsqueeze(-1)

    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield scored
    finally:
        del head.forward
        if before is not None:
            head.forward = before
