"""Groups of given sizes, as a rollout leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vcr1_fast.learner.families.family import Grid, ModelFamily
from vcr1_fast.types import Completion, Example, IntervalTruth, Patches, Prompt, RolloutGroup
from vcr1_fast.video.formats import PATCHES_PER_TOKEN

TEXT_TOKENS = 200  # beside the video: system message, question, ids around it


@dataclass(frozen=True)
class GroupShape:
    """One group: its clip in patches, and the tokens of each completion."""

    grid: Grid
    completions: tuple[int, ...]
    has_features: bool = False  # the clip comes as a frozen tower left it
    text_tokens: int = TEXT_TOKENS


def make_group(shape: GroupShape, family: ModelFamily, config: Any, device: torch.device) -> RolloutGroup:
    """A group of that shape, its pixels or features on `device` as a run's are; token values mean nothing."""
    t, h, w = shape.grid
    num_video = t * h * w // PATCHES_PER_TOKEN
    length, start = num_video + shape.text_tokens, shape.text_tokens // 2
    ids_L = torch.full((length,), 20)  # an id that stands for no picture
    ids_L[start : start + num_video] = family.video_token_id(config)
    rows = 0 if shape.has_features else t * h * w
    values_PC = torch.zeros(rows, family.video.patch_values, dtype=torch.bfloat16, device=device)
    features_MW = None
    if shape.has_features:
        features_MW = torch.zeros(num_video, family.feature_width(config), dtype=torch.bfloat16, device=device)
    patches = Patches(values_PC, shape.grid, 1.0, 2 * t, float(t), features_MW)
    example = Example("fake", "temporal_grounding", "fake.mp4", "an event", float(t), IntervalTruth(((0.0, 1.0),)))
    completions = tuple(Completion(torch.full((n,), 5), torch.full((n,), -1.0), "stop") for n in shape.completions)
    advantages = tuple(1.0 if index % 2 else -1.0 for index in range(len(completions)))
    rewards = tuple(float(index % 2) for index in range(len(completions)))
    prompt = Prompt(example, ids_L, torch.arange(length).expand(3, -1).contiguous(), patches)
    return RolloutGroup(prompt, completions, 1, {}, rewards, advantages)
