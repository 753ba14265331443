"""Several videos, pictures, both and none in one prompt of the real engine, for each family: log-probs are those of the
stock model's forward, which is handed the same pixels and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_example, make_patches
from tests.rollout.sampled_policy import vision_ids
from tests.rollout.sglang.conftest import Family
from tests.rollout.sglang.parity import BOUND
from vcr1_fast.learner.families import family_of
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.types import MediaKind, Patches, Prompt, SamplingParams

Grid = tuple[int, int, int]
PROMPTS: Sequence[Sequence[str | tuple[MediaKind, Grid]]] = (
    ("first ", ("video", (4, 4, 4)), "then ", ("video", (5, 4, 8)), "which is longer?"),
    ("is ", ("image", (1, 4, 8)), "in ", ("video", (4, 4, 4)), "?"),
    (("video", (2, 4, 4)), ("image", (1, 6, 4)), ("video", (1, 8, 4)), "where"),
    (("image", (1, 4, 4)), ("image", (1, 6, 4)), "what differs"),
    ("how many seconds has a minute?",),
)


def build(family: Family, pieces: Sequence[str | tuple[MediaKind, Grid]], seed: int) -> Prompt:
    tokenizer, special = family.engine.tokenizer, SpecialIds.of(family.engine.tokenizer)
    ids: list[int] = []
    grids: list[Grid] = []
    media: list[Patches] = []
    for piece in pieces:
        if isinstance(piece, str):
            ids += tokenizer(piece)["input_ids"]
            continue
        kind, (t, h, w) = piece
        media.append(replace(make_patches((t, h, w), 0.7, seed + len(ids), family.video.patch_values), kind=kind))
        pad = special.video_pad if kind == "video" else special.image_pad
        num_parts = t if family.video.reads_times else 1
        grids += [(t // num_parts, h, w)] * num_parts
        for part in range(num_parts):
            time = tokenizer(f"<{part}.5 seconds>")["input_ids"] if family.video.reads_times and kind == "video" else []
            ids += [*time, special.vision_start, *[pad] * (t // num_parts * h * w // 4), special.vision_end]
    token_ids_L = torch.tensor(ids)
    seconds = [0.7] * len(grids)
    positions_3L = mrope_positions(token_ids_L, grids, seconds, special.video_pad, 2, image_pad_id=special.image_pad)
    return Prompt(make_example(f"{seed}"), token_ids_L, positions_3L, tuple(media))


@torch.no_grad()
def stock_logprobs(model: Any, prompt: Prompt, token_ids_R: Tensor) -> Tensor:
    ids_L = torch.cat([prompt.token_ids_L, token_ids_R])
    position_R = prompt.next_position + torch.arange(len(token_ids_R))
    inputs: dict[str, Tensor] = {}
    for kind, values, grids in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        if own := [patches for patches in prompt.media if patches.kind == kind]:
            inputs[values] = torch.cat([patches.values_PC for patches in own])
            inputs[grids] = torch.tensor([patches.grid_thw for patches in own])
    positions_3L = torch.cat([prompt.position_ids_3L, position_R.expand(3, -1)], dim=1)
    logits_LV = model(input_ids=ids_L[None], position_ids=positions_3L[:, None], **inputs).logits[0]
    logits_LV[:, vision_ids(model.config)] = -torch.inf
    logprob_RV = logits_LV[len(prompt.token_ids_L) - 1 : -1].log_softmax(-1)
    return logprob_RV.gather(1, token_ids_R[:, None])[:, 0]


@torch.no_grad()
def embedded(model: Any, patches: Patches) -> Patches:
    family, tower = family_of(model.config), family_of(model.config).tower(model)
    inputs = family.tower_inputs([patches.grid_thw], model.config.vision_config)
    embeddings_MD = family.run_tower(tower, patches.values_PC, inputs)
    return replace(patches, values_PC=patches.values_PC[:0], embeddings_MD=embeddings_MD)


@pytest.mark.parametrize("of_frozen_tower", [False, True])
def test_a_prompt_shows_any_number_of_videos_and_pictures(family: Family, of_frozen_tower: bool):
    model = family.make_model(7)
    family.engine.load_weights(model.state_dict().items(), 100 + of_frozen_tower)
    prompts = [build(family, pieces, seed) for seed, pieces in enumerate(PROMPTS)]
    sent = (
        [replace(p, media=tuple(embedded(model, m) for m in p.media)) for p in prompts] if of_frozen_tower else prompts
    )
    answers = family.engine.generate(sent, SamplingParams(3, 8))
    for prompt, group in zip(prompts, answers, strict=True):
        assert torch.cat([c.logprobs_R for c in group]).std() > 0.5
        for completion in group:
            wanted_R = stock_logprobs(model, prompt, completion.token_ids_R)
            assert (completion.logprobs_R - wanted_R).abs().max() < BOUND, prompt.example.id
