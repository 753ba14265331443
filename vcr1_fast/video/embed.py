"""Patches -> video tokens, for a rollout engine and for a tower that is never trained.

Shape letters: P patches, M video tokens, W width of what the tower gives for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.transfer import send, send_rows
from vcr1_fast.types import Patches


def embed_videos(
    family: ModelFamily, tower: Any, patches: Sequence[Patches], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[M, W] of all clips in their order: from `tower`, or as a frozen tower left them."""
    features = [p.embeddings_MD for p in patches if p.embeddings_MD is not None]
    if features:
        assert len(features) == len(patches), "one tower is frozen for all clips, or for none"
        return send_rows(features, device, dtype)
    inputs = family.tower_inputs([p.grid_thw for p in patches], tower.config)
    moved = inputs.on(send(inputs.tensors, device))
    return family.run_tower(tower, send_rows([p.values_PC for p in patches], device, dtype), moved)
