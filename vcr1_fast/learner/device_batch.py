"""PackedBatch -> DeviceBatch: everything one row needs on the GPU, made and checked on the host, sent by one copy.

Whatever is looked at in Python (lengths, counts, the row's layout) stays on the host as numbers. So the forward and
backward of a row read nothing back, and the host can build the next row while the GPU computes this one.

Shape letters: T packed tokens, N scored tokens, M video tokens (those of images too), P patches, C values
of a patch, W width of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vcr1_kernels.losses import TokenVectors
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
    video_row_M: Tensor  # int64, where the tokens of videos and images lie in the row
    old_logprob_N: Tensor | None
    values_PC: Tensor | None  # pixels of all videos and images, in the compute precision
    tower: TowerInputs | None  # what the tower takes beside them
    features_MW: Tensor | None  # what a frozen tower made of them
    layout: PrefixLayout
    sequence_lens: tuple[int, ...]  # scored tokens of each completion
    lens_S: Tensor  # the same on the device
    on_host: TokenVectors  # advantages, weights and lengths once more, where the host chooses rows by them
    num_tokens: int  # T
    num_unshared_tokens: int


def device_batch(
    batch: PackedBatch, family: ModelFamily, config: Any, device: torch.device, dtype: torch.dtype
) -> DeviceBatch:
    """Send one row to `device`.

    Args:
        config: the Hugging Face configuration of the whole model.
        dtype: that pixels and features are computed in.

    Raises ValueError when the row's placeholders are not as many as the tokens of its videos and images, when it has
    none, or when only some come with features: a tower that runs on some ranks only would leave FSDP's collectives
    waiting for the others.
    """
    video_row_M = family.media_rows(batch.token_ids_T, config)
    num_video = sum(patches.num_tokens for patches in batch.patches)
    if video_row_M.numel() != num_video or not num_video:
        raise ValueError(
            f"the row has {video_row_M.numel()} placeholders, but its videos and images stand for {num_video} tokens, "
            "wanted as many, and some: build prompts with PromptBuilder"
        )
    features = [p.embeddings_MD for p in batch.patches if p.embeddings_MD is not None]
    if features and len(features) != len(batch.patches):
        raise ValueError(f"{len(features)} of {len(batch.patches)} clips come with embeddings, wanted all or none")
    lens_S = torch.bincount(batch.sequence_N, minlength=batch.num_sequences)
    sequence_lens = tuple(lens_S.tolist())
    tensors = {name: getattr(batch, name) for name in _VECTORS} | {"video_row_M": video_row_M, "lens_S": lens_S}
    old_N = batch.old_logprob_N
    if old_N is not None and old_N.device != device:
        tensors["old_logprob_N"] = old_N
    inputs = None if features else family.tower_inputs([p.grid_thw for p in batch.patches], config.vision_config)
    moved = send(tensors | dict(inputs.tensors if inputs else {}), device)
    values_PC = send_rows([p.values_PC for p in batch.patches], device, dtype) if inputs else None
    vectors: dict[str, Any] = {"old_logprob_N": old_N} | {name: moved[name] for name in tensors}
    return DeviceBatch(
        **vectors,
        values_PC=values_PC,
        tower=inputs.on(moved) if inputs else None,
        features_MW=send_rows(features, device, dtype) if features else None,
        layout=batch.layout,
        sequence_lens=sequence_lens,
        on_host=TokenVectors(batch.advantage_N, batch.weight_N, sequence_lens=sequence_lens),
        num_tokens=batch.num_tokens,
        num_unshared_tokens=batch.num_unshared_tokens,
    )
