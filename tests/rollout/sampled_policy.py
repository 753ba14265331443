"""A policy over the ids that engines draw from: all but those that stand for pictures."""

from __future__ import annotations

from typing import Any

import torch

from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.settings.config import ModelConfig


def vision_ids(config: Any) -> tuple[int, ...]:
    """Neighbours in the tokenizers of the tests, as in the published ones."""
    return tuple(range(config.vision_start_token_id, config.video_token_id + 1))


def policy_of(model: Any) -> PolicyModel:
    return PolicyModel(model, ModelConfig(), torch.float32, suppressed_ids=vision_ids(model.config))
