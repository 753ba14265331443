"""Groups of given sizes, as a rollout leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vcr1_fast.learner.families.family import Grid, ModelFamily
from vcr1_fast.types import Completion, Example, IntervalTruth, MediaKind, Patches, Prompt, RolloutGroup
from vcr1_fast.video.formats import PATCHES_PER_TOKEN

TEXT_TOKENS = 200  # beside the video: system message, question, ids around it


@dataclass(frozen=True)
class GroupShape:
    """One group: its clip in patches, or several of one pair as images, and the tokens of each completion."""

    shown: Grid | tuple[Grid, ...]
    completions: tuple[int, ...]
    has_features: bool = False  # the clip comes as a frozen tower left it
    text_tokens: int = TEXT_TOKENS

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Of all that it shows. As it comes from another process: lists."""
        grids: Any = self.shown if not self.shown or not isinstance(self.shown[0], int) else (self.shown,)
        return tuple(tuple(grid) for grid in grids)


def make_group(shape: GroupShape, family: ModelFamily, config: Any, device: torch.device) -> RolloutGroup:
    """A group of that shape, its pixels or features on `device` as a run's are; token values mean nothing."""
    num_video = sum(t * h * w for t, h, w in shape.grids) // PATCHES_PER_TOKEN
    length, place = num_video + shape.text_tokens, shape.text_tokens // 2
    ids_L = torch.full((length,), 20)  # an id that stands for no picture
    media: list[Patches] = []
    for t, h, w in shape.grids:
        kind: MediaKind = "image" if t == 1 else "video"
        num_tokens = t * h * w // PATCHES_PER_TOKEN
        ids_L[place : place + num_tokens] = config.image_token_id if t == 1 else family.video_token_id(config)
        place += num_tokens
        rows = 0 if shape.has_features else t * h * w
        values_PC = torch.zeros(rows, family.video.patch_values, dtype=torch.bfloat16, device=device)
        features_MW = None
        if shape.has_features:
            features_MW = torch.zeros(num_tokens, family.feature_width(config), dtype=torch.bfloat16, device=device)
        media.append(Patches(values_PC, (t, h, w), 1.0, 2 * t, float(t), features_MW, kind=kind))
    example = Example("fake", "temporal_grounding", "fake.mp4", "an event", 1.0, IntervalTruth(((0.0, 1.0),)))
    completions = tuple(Completion(torch.full((n,), 5), torch.full((n,), -1.0), "stop") for n in shape.completions)
    advantages = tuple(1.0 if index % 2 else -1.0 for index in range(len(completions)))
    rewards = tuple(float(index % 2) for index in range(len(completions)))
    prompt = Prompt(example, ids_L, torch.arange(length).expand(3, -1).contiguous(), tuple(media))
    return RolloutGroup(prompt, completions, 1, {}, rewards, advantages)
