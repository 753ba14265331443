"""Qwen3-VL: a tower without windows, learned position embeddings, and deepstack features for the first decoder layers.

What it shares with Qwen2.5-VL is inherited. Features of a video token lie one beside the other, [M, D (1 + K)]: its
embedding, and what is added to its hidden state behind each of the first K decoder layers (arXiv 2406.04334).

Shape letters: P patches, M video tokens, K layers of the tower that give features, T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration, vision_utils
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vcr1_fast.learner.families.family import Grid, TowerInputs, TowerWork
from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL
from vcr1_fast.learner.model_operators import ModelOperators, RotaryCall
from vcr1_fast.learner.tower_attention import TowerSegments
from vcr1_fast.video.formats import QWEN3_VL


class Qwen3VL(Qwen25VL):
    """See `ModelFamily`."""

    model_type = "qwen3_vl"
    model_class: type[PreTrainedModel] = Qwen3VLForConditionalGeneration
    video = QWEN3_VL
    operators = ModelOperators(
        norms=(modeling.Qwen3VLTextRMSNorm,),
        mlps=(modeling.Qwen3VLTextMLP,),
        text=RotaryCall(modeling.Qwen3VLTextAttention, ("apply_rotary_pos_emb",)),
        tower=RotaryCall(modeling.Qwen3VLVisionAttention, ("apply_rotary_pos_emb_vision",)),
    )

    def module_name(self, name: str) -> str:
        return name  # its published checkpoints name the parts as its modules do

    def checkpoint_name(self, name: str) -> str:
        return name

    def feature_width(self, config: Any) -> int:
        return config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes))

    def build_tower(self, config: Any) -> Any:
        config.vision_config._attn_implementation = "sdpa"
        return modeling.Qwen3VLVisionModel(config.vision_config)

    def tower_parts(self, hf: Any) -> list[nn.Module]:
        tower, parts = self.tower(hf), []
        for index, block in enumerate(tower.blocks):
            parts.append(block)
            if index in tower.deepstack_visual_indexes:
                parts.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)])
        return [*parts, tower.merger]

    def tower_work(self, config: Any) -> TowerWork:
        """Letters: d width, i MLP width. A patch's products: embedding, blocks (4 d d + 2 d i), its share of the 1 + K
        mergers."""
        tower = config.vision_config
        width, merged = tower.hidden_size, tower.spatial_merge_size**2 * tower.hidden_size
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        block = 4 * width * width + 2 * width * tower.intermediate_size
        merger = width * merged + width * tower.out_hidden_size
        num_mergers = 1 + len(tower.deepstack_visual_indexes)
        return TowerWork(
            num_blocks=tower.depth,
            patch_flop=2.0 * (values * width + tower.depth * block + num_mergers * merger),
            window_flop=0.0,
            pair_flop=4.0 * width * tower.depth,
        )

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        grid_thw = torch.tensor(grids, dtype=torch.long)
        cu_seqlens = get_vision_cu_seqlens(grid_thw)
        return TowerInputs(
            tensors={
                "grid_thw": grid_thw,
                "position_ids": get_vision_position_ids(grid_thw, config.spatial_merge_size),
                "cu_seqlens": cu_seqlens,
                **_interpolation(grid_thw, config),
            },
            lengths={"frame": tuple(cu_seqlens.diff().tolist())},
        )

    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        frame = inputs.lengths["frame"]
        segments = TowerSegments.of_lengths((), frame)
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
