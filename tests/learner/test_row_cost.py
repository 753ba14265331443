"""Seconds of a group: FLOPs as counted one product at a time by bench/flops.py, at the stated rates."""

import dataclasses

import pytest
import torch

from bench.flops import decoder_flop, head_flop, tower_flop
from vcr1_fast.learner.row_cost import GroupSize, RowCost, group_size
from vcr1_fast.settings.config import LoRAConfig, ModelConfig

GEMM, FORWARD, BACKWARD = 680e12, 370e12, 300e12
GRID = (4, 24, 32)  # windows of 8 x 8 patches without a remainder


@pytest.mark.parametrize(
    ("model", "passes", "tower_passes"),
    [
        ({}, 3, 3),
        ({"gradient_checkpointing": "full"}, 4, 4),
        ({"gradient_checkpointing": "selective"}, 3, 3),
        ({"freeze_vision": True}, 3, 1),
        ({"lora": LoRAConfig(rank=8), "gradient_checkpointing": "full"}, 3, 1),
    ],
)
def test_costs_are_those_of_the_counted_flops(config_7b, model, passes, tower_passes):
    settings = ModelConfig(**model)
    cost = RowCost.of(config_7b, settings)
    text, vision = config_7b.text_config, config_7b.vision_config
    recomputed = settings.gradient_checkpointing == "full"
    forwards = 1 + recomputed
    assert cost.token_s == pytest.approx(decoder_flop(text, 1, 0) * passes / GEMM)
    one_pair = decoder_flop(text, 1, 1) - decoder_flop(text, 1, 0)
    assert cost.pair_s == pytest.approx(one_pair * (forwards / FORWARD + 2.5 / BACKWARD))
    assert cost.scored_s == pytest.approx(
        head_flop(text, 1) * (passes - recomputed) / GEMM
    )  # the head is not run again
    # The tower at one rate: what its attention is faster or slower than that is taken back.
    num_patches, frame = 4 * 24 * 32, 24 * 32
    windowed, full = 28 * num_patches * 64, 4 * num_patches * frame
    attention = 4 * 1280 * (windowed + full)
    products = tower_flop(vision, [GRID]) - attention
    is_trained = tower_passes > 1
    attention_s = attention * ((forwards if is_trained else 1) / FORWARD + is_trained * 2.5 / BACKWARD)
    got = cost.patch_s * num_patches + cost.tower_pair_s * num_patches * frame
    assert got == pytest.approx(products * tower_passes / GEMM + attention_s)
    num_blocks = 28 + (32 if is_trained else 0)
    assert cost.row_s == pytest.approx(num_blocks * 172 * 5e-6)


def test_model_flop_count_nothing_twice(config_7b):
    """Backward is twice forward, attention's as well; what is recomputed is no work of the step."""
    text, num_pairs = config_7b.text_config, 2_000_000
    size = GroupSize(3000, num_pairs, (GRID,), (300,), 300, True)
    attention = decoder_flop(text, 3000, num_pairs) - decoder_flop(text, 3000, 0)
    tower, frame = tower_flop(config_7b.vision_config, [GRID]), 4 * 24 * 32
    tower_attention = 4 * 1280 * frame * (28 * 64 + 4 * 24 * 32)
    products = decoder_flop(text, 3000, 0) + head_flop(text, 300) + tower - tower_attention
    wanted = 3 * (products + attention + tower_attention)
    for mode in ("none", "full"):
        assert RowCost.of(config_7b, ModelConfig(gradient_checkpointing=mode)).model_flop(size) == pytest.approx(wanted)
    lora = RowCost.of(config_7b, ModelConfig(lora=LoRAConfig(rank=8))).model_flop(size)  # no gradient of a matrix
    decoder = decoder_flop(text, 3000, 0) + head_flop(text, 300)
    assert lora == pytest.approx(2 * decoder + 3 * attention + tower)


def test_sizes_of_a_group_by_hand(make_group):
    group = make_group(0, (3, 1, 0))  # prompt: 34 tokens, fed: 2, 0, 0
    size = group_size(group, mask_truncated=False, is_run=True)
    assert (size.num_tokens, size.num_scored, size.counted, size.grids) == (36, 4, (3, 1, 0), ((3, 4, 8),))
    assert size.num_pairs == 34 * 35 // 2 + 2 * 34 + 3
    cost = RowCost(token_s=1.0, pair_s=1e3, scored_s=1e6, patch_s=1e9, tower_pair_s=1e12, row_s=7.0)
    assert cost.seconds(size) == 36 + 1e3 * size.num_pairs + 4e6 + 96e9 + 96 * 32 * 1e12


def test_truncated_answers_do_not_count_and_embeddings_cost_no_tower(make_group):
    group = make_group(0, (3, 1))
    first, second = group.completions
    patches = dataclasses.replace(group.prompt.media[0], embeddings_MD=torch.zeros(24, 32))
    group = dataclasses.replace(
        group,
        prompt=dataclasses.replace(group.prompt, media=(patches,)),
        completions=(dataclasses.replace(first, finish_reason="length"), second),
    )
    size = group_size(group, mask_truncated=True, is_run=False)
    assert (size.counted, size.num_scored, size.grids, size.is_run) == ((0, 1), 4, (), False)
    assert group_size(group, mask_truncated=False, is_run=False).counted == (3, 1)
