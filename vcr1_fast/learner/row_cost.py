"""What a group costs the learner: its sizes, and the seconds they take by the model's formulas. Used by the step plan.

A plan only compares rows with each other, so the rates need to be right relative to one another; absolute seconds are
those of one H100 or H200 in bfloat16. A forward for a reference or for old log-probs is left out: it takes about the
same share of every row.

Letters: D hidden size, I MLP width, K key and value width, H head width x heads, V vocabulary; P prompt tokens, f fed
tokens of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import Grid
from vcr1_fast.learner.packing import num_fed_tokens, num_packed_tokens
from vcr1_fast.settings.config import ModelConfig
from vcr1_fast.types import RolloutGroup

# Large bfloat16 matrix products: published fused heads reach 660 to 740 of the 989 TFLOP/s that an H100 has. Then
# FlashAttention-2 on an H100, forward and backward; a backward makes 5 products for the 2 of a forward.
H100_FLOP_PER_S = (680e12, 370e12, 300e12)
ATTENTION_BACKWARD_FLOP = 2.5
# At this pace seconds are floating-point operations, and attention's backward is 2 forwards: the usual count, in which
# the scores that flash attention makes again are no work of the model.
COUNTED = (1.0, 1.0, ATTENTION_BACKWARD_FLOP / 2)
# What a row takes however short it is. One row of the 7B model, 28 layers and 32 tower blocks under gradient
# checkpointing, was counted to make 10,318 launches; 5 us of the host for each is an assumption.
LAUNCHES_PER_BLOCK, LAUNCH_S = 172, 5e-6


@dataclass(frozen=True, slots=True)
class GroupSize:
    """All that the other ranks need to know of a group to plan with it."""

    num_tokens: int  # in a packed row
    num_pairs: int  # (query, key) pairs that see each other in one decoder layer
    grids: tuple[Grid, ...]  # of the videos and images that go through the tower; none with a frozen one's embeddings
    counted: tuple[int, ...]  # tokens of each completion that count in the loss
    num_scored: int  # tokens of all completions
    is_run: bool  # whether it goes through the model, or only counts in the denominators


def group_size(group: RolloutGroup, mask_truncated: bool, is_run: bool) -> GroupSize:
    """Pairs: P (P + 1) / 2 of the prompt, and P f + f (f + 1) / 2 of each completion."""
    prompt_len = group.prompt.token_ids_L.numel()
    fed = [num_fed_tokens(c) for c in group.completions]
    return GroupSize(
        num_tokens=num_packed_tokens(group),
        num_pairs=prompt_len * (prompt_len + 1) // 2 + sum(prompt_len * f + f * (f + 1) // 2 for f in fed),
        grids=tuple(patches.grid_thw for patches in group.prompt.media if patches.embeddings_MD is None),
        counted=tuple(0 if mask_truncated and c.finish_reason == "length" else c.num_tokens for c in group.completions),
        num_scored=sum(c.num_tokens for c in group.completions),
        is_run=is_run,
    )


@dataclass(frozen=True)
class RowCost:
    """Seconds of forward and backward for one of each thing a row is made of."""

    token_s: float  # decoder's matrix products
    pair_s: float  # decoder's attention, all layers
    scored_s: float  # head
    patch_s: float  # tower's matrix products and its attention within windows
    tower_pair_s: float  # tower's attention within whole frame pairs
    row_s: float  # of a row without any of them
    counted: RowCost | None = None  # the same in floating-point operations, no block recomputed

    @staticmethod
    def of(config: Any, settings: ModelConfig) -> RowCost:
        """`config`: of the whole model."""
        counted = RowCost.at(COUNTED, config, replace(settings, gradient_checkpointing="none"))
        return replace(RowCost.at(H100_FLOP_PER_S, config, settings), counted=counted)

    @staticmethod
    def at(flop_per_s: tuple[float, float, float], config: Any, settings: ModelConfig) -> RowCost:
        """At these rates of matrix products, attention forward, and attention backward.

        Passes of a matrix product: 1 forward, 1 again under full checkpointing, 1 for the input's gradient, 1 for the
        weight's where it is trained. A tower that is not trained runs forward only, and mostly before the step: its
        launches are not in row_s.
        """
        text, tower = config.get_text_config(), family_of(config).tower_work(config)
        has_lora, recomputed = settings.lora.rank > 0, int(settings.gradient_checkpointing == "full")
        is_tower_trained = not settings.is_tower_frozen
        passes = 2 if has_lora else 3
        tower_passes = 3 + recomputed if is_tower_trained else 1

        hidden, heads = text.hidden_size, text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or hidden // heads
        width, key_width = heads * head_width, text.num_key_value_heads * head_width
        layer = 2 * (2 * hidden * width + 2 * hidden * key_width + 3 * hidden * text.intermediate_size)

        gemm, backward = flop_per_s[0], int(is_tower_trained)

        def attention_s(forwards: int, backwards: int) -> float:
            """Seconds for each FLOP of one forward."""
            return forwards / flop_per_s[1] + backwards * ATTENTION_BACKWARD_FLOP / flop_per_s[2]

        return RowCost(
            token_s=text.num_hidden_layers * layer * (passes + recomputed) / gemm,
            pair_s=text.num_hidden_layers * 4 * width * attention_s(1 + recomputed, 1),
            scored_s=2 * hidden * text.vocab_size * passes / gemm,
            patch_s=tower.patch_flop * tower_passes / gemm
            + tower.window_flop * attention_s(1 + recomputed * backward, backward),
            tower_pair_s=tower.pair_flop * attention_s(1 + recomputed * backward, backward),
            row_s=(text.num_hidden_layers + tower.num_blocks * backward) * LAUNCHES_PER_BLOCK * LAUNCH_S,
        )

    def model_flop(self, size: GroupSize) -> float:
        """Of one group's forward and backward, nothing recomputed: what MFU counts (PaLM, 2204.02311, appendix B).

        What `model.freeze` names counts as trained.
        """
        return self.counted.seconds(size) if self.counted else 0.0

    def seconds(self, size: GroupSize) -> float:
        """Of one group, without its share of the row's own."""
        num_patches = sum(t * h * w for t, h, w in size.grids)
        return (
            self.token_s * size.num_tokens
            + self.pair_s * size.num_pairs
            + self.scored_s * size.num_scored
            + self.patch_s * num_patches
            + self.tower_pair_s * sum(t * (h * w) ** 2 for t, h, w in size.grids)
        )
