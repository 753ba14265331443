"""Qwen3-VL: a tower without windows, learned position embeddings, and deepstack features for the first decoder layers.

Features of a video token lie one beside the other, [M, D (1 + K)]: its embedding, and what is added to its hidden
state behind each of the first K decoder layers (arXiv 2406.04334).

Shape letters: P patches, C values of a patch, M video tokens, K layers of the tower that give features, T packed
tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, vision_utils
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from vcr1_fast.learner.families.family import Grid, ModelFamily, TowerInputs
from vcr1_fast.learner.model_operators import ModelOperators, RotaryCall
from vcr1_fast.learner.tower_attention import TowerSegments
from vcr1_fast.video.formats import QWEN3_VL


class Qwen3VL(ModelFamily):
    model_type = "qwen3_vl"
    model_class = Qwen3VLForConditionalGeneration
    tower_class = modeling.Qwen3VLVisionModel
    video = QWEN3_VL
    operators = ModelOperators(
        norms=(modeling.Qwen3VLTextRMSNorm,),
        mlps=(modeling.Qwen3VLTextMLP,),
        text=RotaryCall(modeling.Qwen3VLTextAttention, ("apply_rotary_pos_emb",)),
        tower=RotaryCall(modeling.Qwen3VLVisionAttention, ("apply_rotary_pos_emb_vision",)),
    )
    num_tower_mlp_matrices = 2

    def num_inner(self, config: Any) -> int:
        return len(config.vision_config.deepstack_visual_indexes)

    def tower_parts(self, hf: Any) -> list[nn.Module]:
        tower, parts = self.tower(hf), []
        for index, block in enumerate(tower.blocks):
            parts.append(block)
            if index in tower.deepstack_visual_indexes:
                parts.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)])
        return [*parts, tower.merger]

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        inputs = super().tower_inputs(grids, config)
        return inputs.beside(_interpolation(inputs.tensors["grid_thw"], config))

    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        segments = TowerSegments.of_lengths(**inputs.lengths)
        output = tower(values_PC, **inputs.tensors, max_seqlen=1, tower_segments=segments)  # 1: as in Qwen25VL
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)

    def decoder_inputs(
        self, hf: nn.Module, embeds_TD: Tensor, features_MW: Tensor, video_row_M: Tensor, num_rows: int = 1
    ) -> dict[str, Any]:
        embedded_MD, *deepstack = features_MW.to(embeds_TD.dtype).split(embeds_TD.shape[1], dim=1)
        # The release's own finds the places by a mask, for which the host waits.
        self.decoder(hf)._deepstack_process = add_features
        return {
            **super().decoder_inputs(hf, embeds_TD, embedded_MD, video_row_M, num_rows),
            "visual_pos_masks": video_row_M,
            "deepstack_visual_embeds": deepstack,
        }


def _interpolation(grid_thw: Tensor, config: Any) -> dict[str, Tensor]:
    """Which of the learned position embeddings a patch gets a share of, under the names that the tower has for them."""
    side, merge = int(config.num_position_embeddings**0.5), config.spatial_merge_size
    if not hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):  # transformers before 5.15
        old: Any = vision_utils
        indices, weights = old.get_vision_bilinear_indices_and_weights(grid_thw, side, merge)
        return {"bilinear_indices": indices, "bilinear_weights": weights}
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    return {"interp_indices": indices, "interp_weights": weights}


def add_features(hidden_BTD: Tensor, video_row_M: Tensor, features_MD: Tensor) -> Tensor:
    """Hidden states with the features of one layer added at the video tokens, whose places count through all rows."""
    hidden_TD = hidden_BTD.flatten(0, 1).index_add(0, video_row_M, features_MD.to(hidden_BTD.dtype))
    return hidden_TD.view(hidden_BTD.shape)
