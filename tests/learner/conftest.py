"""A random model of the real architecture with weights large enough that a wrong position or mask is visible."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from vcr1_fast.types import Completion, Example, IntervalTruth, MediaKind, Patches, Prompt, RolloutGroup

VOCABULARY, IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 64, 59, 60, 61, 62
Shown = tuple[MediaKind, tuple[int, int, int], float]  # kind, grid, seconds of a step of its time axis


def random_model(seed: int = 0, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    return with_large_weights(Qwen2_5_VLForConditionalGeneration(config).float().eval(), seed)


def random_qwen3(seed: int = 0, tied: bool = False) -> Qwen3VLForConditionalGeneration:
    """Four decoder layers, of which three get features of the tower."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 3],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    return with_large_weights(Qwen3VLForConditionalGeneration(config).float().eval(), seed)


Model = TypeVar("Model", bound=PreTrainedModel)


def with_large_weights(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                scale = 1.5 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def random_prompt(
    generator: torch.Generator,
    grid: tuple[int, int, int],
    second_per_grid_s: float,
    text: int,
    num_parts: int = 1,
    num_values: int = 1176,
) -> Prompt:
    """Text, one video, text. Positions by the rule of the original model, written out here a second time.

    num_parts t: two words before each pair of frames, which is a video of its own to the rule."""
    t, h, w = grid
    if num_parts > 1:
        assert num_parts == t
        return _prompt_of_parts(generator, grid, text, num_values)
    num_video = t * h * w // 4
    words = torch.randint(2, 50, (text,), generator=generator)
    video = torch.full((num_video,), VIDEO_PAD)
    token_ids = torch.cat([words, torch.tensor([VISION_START]), video, torch.tensor([VISION_END]), words[:3]])
    start = text + 1
    positions = [[i, i, i] for i in range(start)]
    for frame in range(t):
        for row in range(h // 2):
            time = start + int(frame * second_per_grid_s * 2)
            positions.extend([time, start + row, start + column] for column in range(w // 2))
    after = max(max(p) for p in positions) + 1
    positions += [[after + i] * 3 for i in range(1 + 3)]
    patches = torch.randn(t * h * w, num_values, generator=generator)
    example = Example("e", "temporal_grounding", "v.mp4", "q", 8.0, IntervalTruth(((1.0, 2.0),)))
    return Prompt(
        example, token_ids, torch.tensor(positions).T, (Patches(patches, grid, second_per_grid_s, 2 * t, 8.0),)
    )


def _prompt_of_parts(generator: torch.Generator, grid: tuple[int, int, int], text: int, num_values: int) -> Prompt:
    t, h, w = grid
    ids, positions = torch.randint(2, 50, (text,), generator=generator).tolist(), [[i] * 3 for i in range(text)]
    for _ in range(t):
        start = max(positions[-1]) + 1
        ids += [*torch.randint(2, 50, (2,), generator=generator).tolist(), VISION_START]
        positions += [[start + i] * 3 for i in range(3)]
        ids += [VIDEO_PAD] * (h * w // 4)
        positions += [
            [start + 3, start + 3 + row, start + 3 + column] for row in range(h // 2) for column in range(w // 2)
        ]
        after = start + 3 + max(h, w) // 2
        ids.append(VISION_END)
        positions.append([after] * 3)
    ids += ids[:3]
    positions += [[after + 1 + i] * 3 for i in range(3)]
    patches = Patches(torch.randn(t * h * w, num_values, generator=generator), grid, 1.0, 2 * t, 8.0)
    example = Example("e", "temporal_grounding", "v.mp4", "q", 8.0, IntervalTruth(((1.0, 2.0),)))
    return Prompt(example, torch.tensor(ids), torch.tensor(positions).T, (patches,))


def shown_prompt(
    generator: torch.Generator, shown: Sequence[Shown], text: int, num_values: int, in_words: bool
) -> Prompt:
    """Text, and behind each of `shown` text again. With `in_words` two words before each pair of frames of a video,
    which is one grid to the rule; positions by that rule, a third time."""
    example = Example("e", "multiple_choice", "", "q", 8.0, IntervalTruth(((1.0, 2.0),)))
    ids, positions = torch.randint(2, 50, (text,), generator=generator).tolist(), [[i] * 3 for i in range(text)]
    media = []
    for kind, (t, h, w), seconds in shown:
        pairs = [range(t)] if kind == "image" or not in_words else [range(1)] * t
        for steps in pairs:
            words = torch.randint(2, 50, (2,), generator=generator).tolist()
            ids += [*words, VISION_START] + [IMAGE_PAD if kind == "image" else VIDEO_PAD] * (len(steps) * h * w // 4)
            start = max(positions[-1]) + 1
            positions += [[start + i] * 3 for i in range(3)]
            positions += [
                [start + 3 + int(step * seconds * 2), start + 3 + row, start + 3 + column]
                for step in steps
                for row in range(h // 2)
                for column in range(w // 2)
            ]
            after = max(max(position) for position in positions) + 1
            ids += [VISION_END, *ids[:2]]
            positions += [[after + i] * 3 for i in range(3)]
        patches = torch.randn(t * h * w, num_values, generator=generator)
        media.append(Patches(patches, (t, h, w), seconds, 2 * t, 8.0, kind=kind))
    return Prompt(example, torch.tensor(ids), torch.tensor(positions).T, tuple(media))


def random_group(
    seed: int,
    lengths: tuple[int, ...],
    advantages: tuple[float, ...] | None = None,
    grid: tuple[int, int, int] = (3, 4, 8),
    second_per_grid_s: float = 1.0,
    text: int = 5,
    num_parts: int = 1,
    num_values: int = 1176,
    shown: Sequence[Shown] | None = None,
    in_words: bool = False,
) -> RolloutGroup:
    generator = torch.Generator().manual_seed(seed)
    completions = tuple(
        Completion(torch.randint(2, 50, (n,), generator=generator), -torch.rand(n, generator=generator) - 0.5, "stop")
        for n in lengths
    )
    if advantages is None:
        advantages = tuple(torch.randn(len(lengths), generator=generator, dtype=torch.float64).tolist())
    if shown is not None:
        prompt = shown_prompt(generator, shown, text, num_values, in_words)
    else:
        prompt = random_prompt(generator, grid, second_per_grid_s, text, num_parts, num_values)
    return RolloutGroup(prompt, completions, 1, advantages=advantages)


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture
def make_group():
    return random_group
