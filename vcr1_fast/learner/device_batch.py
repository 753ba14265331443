"""PackedBatch -> DeviceBatch: everything one row needs on the GPU, made and checked on the host, sent by one copy.

Whatever is looked at in Python (lengths, counts, the row's layout) stays on the host as numbers. So the forward and
backward of a row read nothing back, and the host can build the next row while the GPU computes this one.

Shape letters: T packed tokens, N scored tokens, M video tokens, P patches, C values of a patch, W width of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vcr1_kernels.prefix_attention import PrefixLayout

from vcr1_fast.learner.families.family import ModelFamily, TowerInputs
from vcr1_fast.learner.transfer import send, send_rows
from vcr1_fast.types import PackedBatch

_VECTORS = (
    "token_ids_T",
    "position_ids_3T",
    "scored_row_N",
    "target_N",
    "advantage_N",
    "weight_N",
    "engine_logprob_N",
)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A packed row on the device; `PackedBatch` says what its vectors are. Either pixels or features, never both."""

    token_ids_T: Tensor
    position_ids_3T: Tensor
    scored_row_N: Tensor
    target_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    engine_logprob_N: Tensor
    video_row_M: Tensor  # int64, where the video tokens lie in the row
    old_logprob_N: Tensor | None
    values_PC: Tensor | None  # pixels of all clips, in the compute precision
    tower: TowerInputs | None  # what the tower takes beside them
    features_MW: Tensor | None  # what a frozen tower made of them
    layout: PrefixLayout
    sequence_lens: tuple[int, ...]  # scored tokens of each completion
    num_tokens: int  # T
    num_unshared_tokens: int


def device_batch(
    batch: PackedBatch, family: ModelFamily, config: Any, device: torch.device, dtype: torch.dtype
) -> DeviceBatch:
    """Send one row to `device`.

    Args:
        config: the Hugging Face configuration of the whole model.
        dtype: that pixels and features are computed in.

    Raises ValueError when the row's placeholders are not as many as its videos' tokens, or when only some of its clips
    come with features: a tower that runs on some ranks only would leave FSDP's collectives waiting for the others.
    """
    video_row_M = (batch.token_ids_T == family.video_token_id(config)).nonzero().squeeze(1)
    num_video = sum(patches.num_tokens for patches in batch.patches)
    if video_row_M.numel() != num_video:
        raise ValueError(
            f"the row has {video_row_M.numel()} video placeholders, but its clips stand for {num_video} tokens: "
            "build prompts with PromptBuilder"
        )
    features = [p.embeddings_MD for p in batch.patches if p.embeddings_MD is not None]
    if features and len(features) != len(batch.patches):
        raise ValueError(f"{len(features)} of {len(batch.patches)} clips come with embeddings, wanted all or none")
    tensors = {name: getattr(batch, name) for name in _VECTORS} | {"video_row_M": video_row_M}
    old_N = batch.old_logprob_N
    if old_N is not None and old_N.device != device:
        tensors["old_logprob_N"] = old_N
    inputs = None if features else family.tower_inputs([p.grid_thw for p in batch.patches], config.vision_config)
    moved = send(tensors | dict(inputs.tensors if inputs else {}), device)
    values_PC = send_rows([p.values_PC for p in batch.patches], device, dtype) if inputs else None
    vectors: dict[str, Any] = {"old_logprob_N": old_N} | {name: moved[name] for name in tensors}
    lengths = torch.bincount(batch.sequence_N, minlength=batch.num_sequences)
    return DeviceBatch(
        **vectors,
        values_PC=values_PC,
        tower=inputs.on(moved) if inputs else None,
        features_MW=send_rows(features, device, dtype) if features else None,
        layout=batch.layout,
        sequence_lens=tuple(lengths.tolist()),
        num_tokens=batch.num_tokens,
        num_unshared_tokens=batch.num_unshared_tokens,
    )
