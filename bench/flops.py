"""Floating-point operations of one forward of Qwen2.5-VL, exactly counted from its configuration: matrix products and
attention scores; a product of [a, b] by [b, c] counts 2 a b c. Norms, rotary embedding and softmax are left out.

A backward pass counts twice its forward. What gradient checkpointing recomputes is counted apart: it is executed, but
it is no work of the step (model FLOPs utilisation leaves it out).

Shape letters: T tokens, P patches, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int, int]  # frame pairs, patches down, patches across


@dataclass(frozen=True)
class StepFlop:
    """Forward FLOPs of one way to do an update, by part, and how much of it runs a second time."""

    tower: int
    decoder: int
    head: int
    recomputed: int = 0  # forward FLOPs run again in the backward pass

    @property
    def forward(self) -> int:
        return self.tower + self.decoder + self.head

    @property
    def step(self) -> int:
        """Forward and backward: three times the forward."""
        return 3 * self.forward

    @property
    def executed(self) -> int:
        return self.step + self.recomputed


def linear_flop(rows: int, inner: int, outer: int) -> int:
    return 2 * rows * inner * outer


def window_sides(num_patches: int, merge: int, window: int) -> list[int]:
    """Patches of each window along one side: whole windows, then what is left. 20 patches, window 8: 8, 8, 4."""
    side = num_patches // merge
    step = window // merge
    return [merge * min(step, side - start) for start in range(0, side, step)]


def tower_attention_pairs(grid: Grid, merge: int, window: int) -> tuple[int, int]:
    """(query, key) pairs of one layer: attention within windows, and attention within each whole frame pair."""
    num_pairs, height, width = grid
    squares = [sum(n * n for n in window_sides(side, merge, window)) for side in (height, width)]
    return num_pairs * squares[0] * squares[1], num_pairs * (height * width) ** 2


def tower_flop(vision: Any, grids: Sequence[Grid]) -> int:
    """Patch embedding, blocks and mergers of the vision tower over these videos.

    `vision`: a Qwen2_5_VLVisionConfig, or a Qwen3VLVisionConfig: there the MLP has no gate, no layer has windows, and
    three inner layers have mergers of their own.
    """
    width, inner, merge = vision.hidden_size, vision.intermediate_size, vision.spatial_merge_size
    deepstack = getattr(vision, "deepstack_visual_indexes", None)
    window = merge if deepstack else vision.window_size // vision.patch_size
    num_patches = sum(t * h * w for t, h, w in grids)
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # qkv, output projection, and the gate, up and down products of the MLP
    block = linear_flop(num_patches, width, 4 * width)
    block += linear_flop(num_patches, width, (2 if deepstack else 3) * inner)
    pairs = [tower_attention_pairs(grid, merge, window) for grid in grids]
    num_full = vision.depth if deepstack else len(vision.fullatt_block_indexes)
    windowed, full = (sum(p[i] for p in pairs) for i in (0, 1))
    attention = 4 * width * ((vision.depth - num_full) * windowed + num_full * full)
    merged = merge**2 * width
    num_merged = num_patches // merge**2
    merger = linear_flop(num_merged, merged, merged) + linear_flop(num_merged, merged, vision.out_hidden_size)
    mergers = (1 + len(deepstack or ())) * merger
    return linear_flop(num_patches, patch_values, width) + vision.depth * block + attention + mergers


def decoder_flop(text: Any, num_tokens: int, num_pairs: int) -> int:
    """All decoder layers over `num_tokens`, with `num_pairs` visible (query, key) pairs in each layer.

    `text`: a Qwen2_5_VLTextConfig or a Qwen3VLTextConfig.
    """
    hidden = text.hidden_size
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    query_width, kv_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    per_layer = (
        linear_flop(num_tokens, hidden, 2 * query_width + 2 * kv_width)
        + linear_flop(num_tokens, hidden, 3 * text.intermediate_size)
        + 4 * num_pairs * query_width
    )
    return text.num_hidden_layers * per_layer


def head_flop(text: Any, num_rows: int) -> int:
    return linear_flop(num_rows, text.hidden_size, text.vocab_size)


def checkpoint_bytes(config: Any, num_tokens: int, num_patches: int, itemsize: int) -> int:
    """What gradient checkpointing keeps: the input of every layer."""
    text, vision = config.text_config, config.vision_config
    decoder = num_tokens * text.num_hidden_layers * text.hidden_size
    return itemsize * (decoder + num_patches * vision.depth * vision.hidden_size)


def activation_bytes(config: Any, num_tokens: int, num_patches: int, itemsize: int) -> int:
    """Rough bytes of activations kept for backward without checkpointing, only to skip attempts that cannot fit.

    Of each layer and token: about 12 tensors of the hidden size (two of them in float32 inside the norms), and 4 of the
    intermediate size in the MLP.
    """
    text, vision = config.text_config, config.vision_config
    decoder = num_tokens * text.num_hidden_layers * (12 * text.hidden_size + 4 * text.intermediate_size)
    tower = num_patches * vision.depth * (12 * vision.hidden_size + 4 * vision.intermediate_size)
    return itemsize * (decoder + tower)
