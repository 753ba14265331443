"""Public sizes as real models without weights, and groups of given lengths for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from vcr1_fast.learner.families.family import Grid, ModelFamily
from vcr1_fast.types import Completion, Example, IntervalTruth, Patches, Prompt, RolloutGroup

TEXT_TOKENS = 200  # beside the video: system message, question, ids around it


def public_config(sizes: dict[str, Any], layers: int | None = None, depth: int | None = None) -> Qwen2_5_VLConfig:
    """A whole configuration from what `learner.public_sizes` holds. `layers`, `depth`: fewer blocks, equal ones."""
    tower = dict(sizes["vision_config"])
    depth = depth or tower["depth"]
    num_layers = layers or sizes["num_hidden_layers"]
    text = {key: value for key, value in sizes.items() if key != "vision_config"} | {
        "num_hidden_layers": num_layers,
        "max_window_layers": num_layers,
        "use_sliding_window": False,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    full = [index for index in (7, 15, 23, 31) if index < depth] or [depth - 1]
    tower |= {
        "depth": depth,
        "num_heads": 16,
        "fullatt_block_indexes": full,
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=sizes["tie_word_embeddings"],
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


@dataclass(frozen=True)
class GroupShape:
    """One group: its clip in patches, and the tokens of each completion."""

    grid: Grid
    completions: tuple[int, ...]
    has_features: bool = False  # the clip comes as a frozen tower left it


def make_group(shape: GroupShape, family: ModelFamily, config: Any, device: torch.device) -> RolloutGroup:
    """A group of that shape, its pixels or features on `device` as a run's are; token values mean nothing."""
    t, h, w = shape.grid
    num_video = t * h * w // family.patches_per_token
    length = num_video + TEXT_TOKENS
    ids_L = torch.full((length,), 1000)
    ids_L[TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + num_video] = family.video_token_id(config)
    rows = 0 if shape.has_features else t * h * w
    values_PC = torch.zeros(rows, family.patch_values, dtype=torch.bfloat16, device=device)
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


def lengths_between(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` lengths spread evenly from `low` to `high`: the same in every run."""
    return tuple(low + (high - low) * index // max(count - 1, 1) for index in range(count))


def num_tokens(shapes: Sequence[GroupShape], family: ModelFamily) -> int:
    """Packed tokens of these groups."""
    return sum(
        shape.grid[0] * shape.grid[1] * shape.grid[2] // family.patches_per_token
        + TEXT_TOKENS
        + sum(max(n - 1, 0) for n in shape.completions)
        for shape in shapes
    )
