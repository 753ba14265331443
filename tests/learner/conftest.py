"""A random model of the real architecture with weights large enough that a wrong position or mask is visible."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.learner.golden_case import (
    IMAGE_PAD,
    MROPE_SECTION,
    ROPE_THETA,
    TEXT,
    TOKEN_IDS,
    VIDEO_PAD,
    VISION,
    VISION_END,
    VISION_START,
)
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.types import Completion, Example, IntervalTruth, MediaKind, Patches, Prompt, RolloutGroup

Shown = tuple[MediaKind, tuple[int, int, int], float]  # kind, grid, seconds of a step of its time axis


def text_config(tied: bool, **rope: object) -> dict[str, object]:
    positions = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": MROPE_SECTION, **rope}
    return TEXT | {"tie_word_embeddings": tied, "rope_parameters": positions}


def random_model(seed: int = 0, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    text = text_config(tied)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=dict(VISION), tie_word_embeddings=tied, **TOKEN_IDS)
    torch.manual_seed(seed)
    return with_large_weights(Qwen2_5_VLForConditionalGeneration(config).float().eval(), seed)


def random_qwen3(seed: int = 0, tied: bool = False) -> Qwen3VLForConditionalGeneration:
    """Four decoder layers, of which three get features of the tower."""
    text = text_config(tied, mrope_interleaved=True) | {"num_hidden_layers": 4, "head_dim": 8}
    vision = {
        "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 3],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **TOKEN_IDS)
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
    generator: torch.Generator, shown: Sequence[Shown], text: int, num_values: int, in_words: bool, around: int
) -> Prompt:
    """Text, and `around` words before and two behind each of `shown`; three behind it where none are before. With
    `in_words` that is each pair of frames of a video, which is one grid to the rule. Positions by the rule of the
    original model, written out here a second time.
    """
    example = Example("e", "temporal_grounding", "v.mp4", "q", 8.0, IntervalTruth(((1.0, 2.0),)))
    ids, positions = torch.randint(2, 50, (text,), generator=generator).tolist(), [[i] * 3 for i in range(text)]
    media = []
    for kind, (t, h, w), seconds in shown:
        for steps in [range(1)] * t if in_words and kind == "video" else [range(t)]:
            words = torch.randint(2, 50, (around,), generator=generator).tolist()
            ids += [*words, VISION_START] + [IMAGE_PAD if kind == "image" else VIDEO_PAD] * (len(steps) * h * w // 4)
            start = max(positions[-1]) + 1
            positions += [[start + i] * 3 for i in range(around + 1)]
            start += around + 1
            positions += [
                [start + int(step * seconds * 2), start + row, start + column]
                for step in steps
                for row in range(h // 2)
                for column in range(w // 2)
            ]
            after = max(max(position) for position in positions) + 1
            behind = ids[: 2 if around else 3]
            ids += [VISION_END, *behind]
            positions += [[after + i] * 3 for i in range(1 + len(behind))]
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
    num_values: int = 1176,
    shown: Sequence[Shown] | None = None,
    in_words: bool = False,
) -> RolloutGroup:
    """`shown`: in the place of one video of this grid."""
    generator = torch.Generator().manual_seed(seed)
    completions = tuple(
        Completion(torch.randint(2, 50, (n,), generator=generator), -torch.rand(n, generator=generator) - 0.5, "stop")
        for n in lengths
    )
    if advantages is None:
        advantages = tuple(torch.randn(len(lengths), generator=generator, dtype=torch.float64).tolist())
    around = 0 if shown is None and not in_words else 2
    shown = [("video", grid, second_per_grid_s)] if shown is None else shown
    prompt = random_prompt(generator, shown, text, num_values, in_words, around)
    return RolloutGroup(prompt, completions, 1, advantages=advantages)


@pytest.fixture(scope="session")
def config_7b() -> PreTrainedConfig:
    return AutoConfig.for_model(**whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"]))


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture
def make_group():
    return random_group
