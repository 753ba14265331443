"""FLOP counts against numbers worked out by hand, and against torch's own counter on a real forward."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.floors import causal_pairs, separate_pairs, shared_pairs
from bench.flops import (
    decoder_flop,
    tower_attention_pairs,
    tower_flop,
    window_sides,
)
from bench.step_model import TINY_CHECK
from bench.step_ways import WayOptions, count_flop, count_tokens, losses
from vcr1_fast.learner.model import load_hugging_face


def test_windows_of_a_side_that_does_not_divide():
    assert window_sides(20, 2, 8) == [8, 8, 4]
    assert window_sides(16, 2, 8) == [8, 8]
    # 2 frame pairs of 4 x 20 patches: windows of 4x8, 4x8, 4x4 patches, so 2 (32^2 + 32^2 + 16^2) and 2 * 80^2
    assert tower_attention_pairs((2, 4, 20), 2, 8) == (2 * (1024 + 1024 + 256), 2 * 6400)


def test_decoder_of_one_layer_by_hand():
    # 8 tokens, hidden 4 in 2 heads of 2, 1 key head, intermediate 6:
    # q 2*8*4*4 + o the same + k, v 2*8*4*2 each + mlp 3 * 2*8*4*6, and 4 * pairs * hidden of attention
    text = SimpleNamespace(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6, num_hidden_layers=1
    )
    assert decoder_flop(text, 8, 36) == 2 * 256 + 2 * 128 + 3 * 384 + 4 * 36 * 4


def test_tower_of_one_layer_by_hand():
    # 4 patches (one token) of 3 values, width 4, intermediate 5, one full-attention layer, output width 7
    vision = SimpleNamespace(
        hidden_size=4, intermediate_size=5, spatial_merge_size=2, window_size=4, patch_size=1, in_channels=3,
        temporal_patch_size=1, fullatt_block_indexes=[0], depth=1, out_hidden_size=7,
    )  # fmt: skip
    embed, qkv_and_out, mlp, attention = 2 * 4 * 3 * 4, 2 * 4 * 4 * 16, 2 * 4 * 4 * 15, 4 * 16 * 4
    merger = 2 * 1 * 16 * 16 + 2 * 1 * 16 * 7
    assert tower_flop(vision, [(1, 2, 2)]) == embed + qkv_and_out + mlp + attention + merger


def test_pairs():
    assert causal_pairs(4) == 10
    assert shared_pairs(4, [2, 3]) == 10 + (2 * 4 + 3) + (3 * 4 + 6)
    assert separate_pairs(4, [2, 3]) == 21 + 28


@pytest.mark.parametrize("name", ["plain", "kernels"])
def test_counts_equal_what_torch_counts(name):
    """Matrix products and attention of a real forward of the tiny model. torch counts dense attention over the whole
    square where the count here takes the visible pairs, so attention is taken out of both."""
    hf = load_hugging_face("tiny", torch.float32, torch.device("cpu")).train()
    group = TINY_CHECK.group(hf.config.video_token_id, hf.device, hf.dtype)
    options = WayOptions(TINY_CHECK.num_completions, gradient_checkpointing=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for call in losses(name, hf, group, options):
            call()
    counted = sum(
        flop
        for op, flop in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(op) and "bmm" not in str(op)
    )
    flop = count_flop(name, hf.config, group, options)
    counts, text, vision = count_tokens(name, group), hf.config.text_config, hf.config.vision_config
    windowed, full = tower_attention_pairs(TINY_CHECK.grid, 2, vision.window_size // 14)
    num_full = len(vision.fullatt_block_indexes)
    runs = 1 if name == "kernels" else TINY_CHECK.num_completions
    tower_pairs = runs * ((vision.depth - num_full) * windowed + num_full * full)
    attention = 4 * vision.hidden_size * tower_pairs
    attention += 4 * text.hidden_size * counts.pairs * text.num_hidden_layers
    assert flop.forward - attention == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("name", ["tiny", "tiny3"])
def test_products_of_both_families_equal_what_torch_counts(name):
    """The stock tower on 2 pairs of 8 x 12 patches, and the text model on 7 tokens; attention is taken out of both."""
    hf = load_hugging_face(name, torch.float32, torch.device("cpu"))
    vision, text, grid = hf.config.vision_config, hf.config.text_config, (2, 8, 12)
    values_PC = torch.zeros(2 * 8 * 12, 3 * 2 * vision.patch_size**2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf.model.visual(values_PC, grid_thw=torch.tensor([grid]))
        hf.model.language_model(input_ids=torch.zeros(1, 7, dtype=torch.int64))
    counted = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    products = sum(flop for op, flop in counted.items() if "attention" not in op and "bmm" not in op)
    window = getattr(vision, "window_size", 2 * vision.patch_size) // vision.patch_size
    windowed, full = tower_attention_pairs(grid, 2, window)
    num_full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    attention = 4 * vision.hidden_size * ((vision.depth - num_full) * windowed + num_full * full)
    assert tower_flop(vision, [grid]) - attention + decoder_flop(text, 7, 0) == pytest.approx(products, rel=1e-3)
