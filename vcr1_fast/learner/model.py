"""The policy: a Hugging Face model whose forward takes one DeviceBatch and gives log-probs or the loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from vcr1_fast.learner import recompute
from vcr1_fast.learner.attention import use_packed_attention
from vcr1_fast.learner.device_batch import DeviceBatch, device_batch
from vcr1_fast.learner.ends import embedded, scored, use_ends
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.freezing import freeze
from vcr1_fast.learner.kernel_choice import KernelChoice, plain_choice
from vcr1_fast.learner.loading import empty_model, load_weights
from vcr1_fast.learner.objective import Objective, Sums
from vcr1_fast.learner.packing import placeholder, with_media
from vcr1_fast.learner.tower_attention import is_one_call
from vcr1_fast.run.model_folder import model_folder, require_tokenizer, settings_files
from vcr1_fast.settings.config import ConfigError, ModelConfig
from vcr1_fast.types import PackedBatch


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32


transformers_logging.disable_progress_bar()  # it would tear our own lines apart


def load_hugging_face(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint's whole model on `device`, all weights in `dtype`. Raises ConfigError as `load_weights` does."""
    folder = model_folder(path)
    hf = empty_model(folder, dtype)
    load_weights(hf, folder, device, family_of(hf.config))
    return hf


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError when the folder has no tokenizer, or one that cannot be read."""
    folder = model_folder(path)
    settings_files(folder)
    require_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's own reader raises
        reason = " ".join(str(error).split())
        raise ConfigError(f"the tokenizer in {folder} cannot be read ({reason}): copy its files there again") from error


class PolicyModel(nn.Module):
    """forward(DeviceBatch) -> (logprob_N, entropy_N), or with an objective -> (loss, sums).

    The vision tower runs once per prompt, the decoder once per row, the head on scored rows only.

    Everything happens inside one forward so that FSDP's hooks on the root see every use of a weight, and nothing in it
    reads from the device: what Python looks at is in the batch as host numbers.
    """

    def __init__(
        self,
        hf: Any,
        config: ModelConfig,
        compute_dtype: torch.dtype,
        kernels: KernelChoice | None = None,
        device: torch.device | None = None,
        suppressed_ids: Sequence[int] = (),
    ) -> None:
        """`hf`: a Hugging Face model of a known family.
        `kernels`: what a run has chosen; None: by the device, or plain where `config.kernels` is off.
        `device`: that it will run on, where its weights are still on meta; None: where they are.
        `suppressed_ids`: that the rollout never draws: the policy gives them probability 0, too."""
        super().__init__()
        self._suppressed_ids = suppressed_ids
        self.hf = hf
        self.family = family_of(hf.config)
        self.compute_dtype = compute_dtype
        self._has_features = config.is_tower_frozen  # its clips come as the tower left them
        self.kernels = kernels or (plain_choice() if config.kernels == "off" else KernelChoice())
        use_packed_attention(self.family.decoder(hf))
        use_ends(hf)
        tower = self.family.tower(hf)
        self.kernels.switch_tower(tower, device or hf.device, compute_dtype)
        self.kernels.switch_operators(hf, self.family.operators, device or hf.device)
        freeze(hf, config)
        recompute.switch_on(hf, config.gradient_checkpointing)
        if config.compile:
            self._compile(config.gradient_checkpointing)

    def _compile(self, mode: str) -> None:
        """Blocks of the decoder, and of a tower whose attention is one call: elsewhere it is one for each window."""
        from vcr1_fast.learner.compiling import compile_blocks  # imports torch's compiler

        tower, layers = self.family.tower(self.hf), self.family.decoder(self.hf).layers
        compile_blocks([*layers, *(tower.blocks if is_one_call(tower) else ())], mode)

    def device_batch(self, batch: PackedBatch) -> DeviceBatch:
        """`batch` on the device of the weights; with something to see in it, see `with_media`. Raises ValueError where
        it does not fit this model."""
        where = (self.hf.device, self.compute_dtype)
        if not batch.patches:
            batch = with_media(batch, placeholder(self.family, self.hf.config, self._has_features, *where))
        return device_batch(batch, self.family, self.hf.config, *where)

    @overload
    def forward(self, batch: DeviceBatch, temperature: float, objective: None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, batch: DeviceBatch, temperature: float, objective: Objective) -> tuple[Tensor, Sums]: ...
    def forward(
        self, batch: DeviceBatch, temperature: float, objective: Objective | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Sums]:
        """Log-probability and entropy of each scored token, [N] each, at the sampling temperature.

        With an objective its loss and sums instead: the head then makes its gradients in forward, in 3 GEMMs.
        """
        with self._autocast():
            hidden_TD = self._decode(batch)
        # Under autocast the last hidden states and the weight are float32; the head multiplies what the decoder would.
        scored_ND = hidden_TD[batch.scored_row_N].to(self.compute_dtype)

        def score(scored_ND: Tensor, weight_VD: Tensor) -> Any:
            head = (scored_ND, weight_VD.to(self.compute_dtype), batch.target_N)
            if objective is None:
                return self.kernels.linear_logprob(*head, temperature, self._suppressed_ids)
            loss = (objective.loss, objective.tokens, temperature, self._suppressed_ids)
            return self.kernels.linear_policy_loss(*head, *loss)

        is_fused = objective is not None and self.kernels.policy_loss.way != "plain"  # gradients are made in forward
        return scored(self.hf, scored_ND, score, needs_weight_again=not is_fused)

    def _decode(self, batch: DeviceBatch) -> Tensor:
        """Final hidden states [T, D] of the packed row."""
        features_MW = batch.features_MW
        if features_MW is None:
            assert batch.values_PC is not None and batch.tower is not None, "pixels or features"
            features_MW = self.family.run_tower(self.family.tower(self.hf), batch.values_PC, batch.tower)
        # After the tower, so that its gradient is complete, and added up over ranks, before the tower's backward
        embeds_TD, features_MW = embedded(self.hf, batch.token_ids_T, features_MW)
        row = (batch.position_ids_3T, features_MW, batch.video_row_M, batch.layout)
        return self.family.decode(self.hf, embeds_TD, *row, self.kernels.prefix_backend)

    def _autocast(self) -> AbstractContextManager[object]:
        """bfloat16 matrix products on float32 master weights."""
        if self.compute_dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.hf.device.type, dtype=self.compute_dtype)
