"""Patches -> video tokens: what learner and engine put in the places of the video placeholders.

Shape letters: P patches, M video tokens, D hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcr1_fast.types import Patches

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def stack_patches(patches: Sequence[Patches], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All videos' patches one after the other [P, 1176], and their grids [videos, 3] on the CPU.

    The grids stay on the CPU: the tower derives Python-side window indices from them, and reading them back from a GPU
    would stall it once per call.
    """
    values_PC = torch.cat([p.values_PC for p in patches]).to(device=device, dtype=dtype, non_blocking=True)
    return values_PC, torch.tensor([p.grid_thw for p in patches], dtype=torch.long)


def embed_videos(hf: Qwen2_5_VLForConditionalGeneration, patches: Sequence[Patches], dtype: torch.dtype) -> Tensor:
    """Video tokens [M, D] of all clips in their order: from the tower of `hf`, or as a frozen tower left them.

    Either all clips come with embeddings or none does: a tower that runs on some ranks only would leave FSDP's
    collectives waiting for the others.
    """
    embeddings = [p.embeddings_MD for p in patches if p.embeddings_MD is not None]
    if embeddings and len(embeddings) == len(patches):
        return torch.cat(embeddings).to(hf.device, dtype)
    if embeddings:
        raise ValueError(f"{len(embeddings)} of {len(patches)} clips come with embeddings, wanted all or none")
    values_PC, grids = stack_patches(patches, hf.device, dtype)
    return hf.model.visual(values_PC, grid_thw=grids).pooler_output
