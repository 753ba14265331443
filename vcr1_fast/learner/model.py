"""The policy: a Hugging Face Qwen2.5-VL whose forward takes one PackedBatch and gives log-probs or the loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging
from vcr1_kernels import fused_linear_logprob, fused_linear_policy_loss, reference, unavailable_reason
from vcr1_kernels.prefix_attention import AttentionBackend, attention_backend

from vcr1_fast.learner.attention import use_packed_attention
from vcr1_fast.learner.loading import empty_model, load_weights
from vcr1_fast.learner.objective import Objective, Sums
from vcr1_fast.learner.tower_attention import use_varlen_tower
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.config import ConfigError, ModelConfig
from vcr1_fast.types import PackedBatch
from vcr1_fast.video.embed import embed_videos


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32


def describe_kernels(config: ModelConfig, device: torch.device) -> str:
    """What head and attention of the learner run on, for the line a run prints at its start.

    Raises ConfigError on CUDA when the Triton kernels cannot run and `model.kernels` is not off.
    """
    if config.kernels == "off":
        return "head: plain torch, attention: plain torch (model.kernels is off)"
    if device.type != "cuda":
        return "head: fused, in torch; attention: packed rows, torch's flash attention for CPUs"
    reason = unavailable_reason()
    if reason is not None:
        raise ConfigError(f"model.kernels is auto, but the Triton kernels cannot run: {reason}; or set it to off")
    attention = attention_backend(device, resolve_dtype(config, device))
    return f"head: fused, 3 GEMMs, Triton rows; attention: packed rows, {attention.name}, {attention.reason}"


transformers_logging.disable_progress_bar()  # it would tear our own lines apart


def load_hugging_face(path: str, dtype: torch.dtype, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """A checkpoint's whole model on `device`, all weights in `dtype`. Raises ConfigError as `load_weights` does."""
    folder = model_folder(path)
    hf = empty_model(folder, dtype)
    load_weights(hf, folder, device)
    return hf


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder(path), local_files_only=True)


class PolicyModel(nn.Module):
    """forward(PackedBatch) -> (logprob_N, entropy_N), or with an objective -> (loss, sums).

    The vision tower runs once per prompt, the decoder once per row, the head on scored rows only.

    Everything happens inside one forward so that FSDP's hooks on the root see every use of a weight.
    """

    def __init__(
        self,
        hf: Qwen2_5_VLForConditionalGeneration,
        config: ModelConfig,
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        """`device`: where the weights will be, when they are still on meta."""
        super().__init__()
        self.hf = hf
        self.compute_dtype = compute_dtype
        self.uses_kernels = config.kernels == "auto"
        self.prefix_backend: AttentionBackend = "auto" if self.uses_kernels else "torch"
        use_packed_attention(hf)
        if self.uses_kernels and (device or hf.device).type == "cuda" and compute_dtype == torch.bfloat16:
            use_varlen_tower(hf.model.visual)
        if config.freeze_vision:
            hf.model.visual.requires_grad_(False)
        if config.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})

    @overload
    def forward(self, batch: PackedBatch, temperature: float, objective: None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, batch: PackedBatch, temperature: float, objective: Objective) -> tuple[Tensor, Sums]: ...
    def forward(
        self, batch: PackedBatch, temperature: float, objective: Objective | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Sums]:
        """Log-probability and entropy of each scored token, [N] each, at the sampling temperature.

        With an objective its loss and sums instead: the head then makes its gradients in forward, in 3 GEMMs.
        """
        with self._autocast():
            hidden_TD = self._decode(batch)
        device = hidden_TD.device
        # Under autocast the last hidden states and the weight are float32; the head multiplies what the decoder would.
        scored_ND = hidden_TD[batch.scored_row_N.to(device)].to(self.compute_dtype)
        head = (scored_ND, self.hf.lm_head.weight.to(self.compute_dtype), batch.target_N.to(device))
        if objective is None:
            linear_logprob = fused_linear_logprob if self.uses_kernels else reference.linear_logprob
            return linear_logprob(*head, temperature)
        linear_policy_loss = fused_linear_policy_loss if self.uses_kernels else reference.linear_policy_loss
        return linear_policy_loss(*head, objective.loss, objective.tokens, temperature)

    def _decode(self, batch: PackedBatch) -> Tensor:
        """Final hidden states [T, D] of the packed row."""
        device = self.hf.device
        token_ids_1T = batch.token_ids_T.to(device).unsqueeze(0)
        embeds_1TD = self.hf.get_input_embeddings()(token_ids_1T)
        is_video_1T = token_ids_1T == self.hf.config.video_token_id
        video_MD = embed_videos(self.hf, batch.patches, self.compute_dtype)
        if int(is_video_1T.sum()) != video_MD.shape[0]:
            raise ValueError(
                f"the row has {int(is_video_1T.sum())} video placeholders, but the tower gave {video_MD.shape[0]} rows"
            )
        embeds_1TD = embeds_1TD.masked_scatter(is_video_1T.unsqueeze(-1), video_MD.to(embeds_1TD.dtype))
        output = self.hf.model.language_model(
            inputs_embeds=embeds_1TD,
            position_ids=batch.position_ids_3T.to(device).unsqueeze(1),
            attention_mask={"full_attention": None},  # as a dict it is taken as ready: no [T, T] mask is built
            use_cache=False,
            prefix_layout=batch.layout,
            prefix_backend=self.prefix_backend,
        )
        return output.last_hidden_state[0]

    def _autocast(self) -> AbstractContextManager[object]:
        """bfloat16 matrix products on float32 master weights."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.hf.device.type, dtype=self.compute_dtype)
