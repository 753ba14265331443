"""Qwen2.5-VL: windowed vision tower, one embedding for a video token, M-RoPE.

Shape letters: P patches, C values of a patch, M video tokens, T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index
from vcr1_kernels.prefix_attention import AttentionBackend, PrefixLayout, layout_to_tensor

from vcr1_fast.learner.families.family import Grid, TowerInputs, TowerWork
from vcr1_fast.learner.model_operators import ModelOperators, RotaryCall
from vcr1_fast.learner.tower_attention import TowerSegments
from vcr1_fast.video.formats import QWEN2_5_VL

# transformers names the parts of the model by its modules, the published checkpoints and other engines by these.
_RENAMED = {"model.visual.": "visual.", "model.language_model.": "model."}


class Qwen25VL:
    """See `ModelFamily`."""

    model_type = "qwen2_5_vl"
    model_class: type[PreTrainedModel] = Qwen2_5_VLForConditionalGeneration
    video = QWEN2_5_VL
    tower_name = "model.visual"
    layers_name = "model.language_model.layers"
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    operators = ModelOperators(
        norms=(modeling.Qwen2_5_VLRMSNorm,),
        mlps=(modeling.Qwen2MLP, modeling.Qwen2_5_VLMLP),
        text=RotaryCall(modeling.Qwen2_5_VLAttention, ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")),
        tower=RotaryCall(modeling.Qwen2_5_VLVisionAttention, ("apply_rotary_pos_emb_vision",)),
    )

    def module_name(self, name: str) -> str:
        if name.startswith(tuple(_RENAMED)):
            return name
        for new, old in _RENAMED.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def checkpoint_name(self, name: str) -> str:
        for new, old in _RENAMED.items():
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def media_rows(self, token_ids: Tensor, config: Any) -> Tensor:
        is_media = (token_ids == config.video_token_id) | (token_ids == config.image_token_id)
        return is_media.flatten().nonzero().squeeze(1)

    def feature_width(self, config: Any) -> int:
        return config.text_config.hidden_size

    def build_tower(self, config: Any) -> Any:
        config.vision_config._attn_implementation = "sdpa"
        return modeling.Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)

    def tower(self, hf: Any) -> Any:
        return hf.model.visual

    def decoder(self, hf: Any) -> Any:
        return hf.model.language_model

    def tower_parts(self, hf: Any) -> list[nn.Module]:
        return [*hf.model.visual.blocks, hf.model.visual.merger]

    def tower_work(self, config: Any) -> TowerWork:
        """Letters: d width, i MLP width. A patch's products: embedding, blocks (4 d d + 3 d i), its share of the
        merger. Pairs of a patch: its window, where a few are fewer at a frame's edges."""
        tower = config.vision_config
        width, merged = tower.hidden_size, tower.spatial_merge_size**2 * tower.hidden_size
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        block = 4 * width * width + 3 * width * tower.intermediate_size
        merger = width * merged + width * tower.out_hidden_size
        window, num_full = (tower.window_size // tower.patch_size) ** 2, len(tower.fullatt_block_indexes)
        return TowerWork(
            num_blocks=tower.depth,
            patch_flop=2.0 * (values * width + tower.depth * block + merger),
            window_flop=4.0 * width * window * (tower.depth - num_full),
            pair_flop=4.0 * width * num_full,
        )

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        grid_thw = torch.tensor(grids, dtype=torch.long)
        window_index, cu_window_seqlens = get_vision_window_index(
            grid_thw,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        cu_seqlens = get_vision_cu_seqlens(grid_thw)
        return TowerInputs(
            tensors={
                "grid_thw": grid_thw,
                "position_ids": get_vision_position_ids(grid_thw, config.spatial_merge_size),
                "window_index": window_index,
                "cu_window_seqlens": cu_window_seqlens,
                "cu_seqlens": cu_seqlens,
            },
            lengths={
                "window": tuple(cu_window_seqlens.diff().tolist()),
                "frame": tuple(cu_seqlens.diff().tolist()),
            },
        )

    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        # Everything is given, so that nothing of it is computed from a grid on the device, which would wait for it.
        # Newer releases take the longest lengths, older ones hand them on; our attention reads `tower_segments`, and no
        # other looks at them: the same number each time, for which no block has to be compiled anew.
        window, frame = inputs.lengths["window"], inputs.lengths["frame"]
        output = tower(
            values_PC,
            **inputs.tensors,
            max_seqlen=1,
            max_window_seqlen=1,
            tower_segments=TowerSegments.of_lengths(window, frame),
        )
        return output.pooler_output

    def decoder_inputs(
        self, hf: nn.Module, embeds_TD: Tensor, features_MW: Tensor, video_row_M: Tensor, num_rows: int = 1
    ) -> dict[str, Any]:
        embeds_TD = embeds_TD.index_copy(0, video_row_M, features_MW.to(embeds_TD.dtype))
        return {"inputs_embeds": embeds_TD.unflatten(0, (num_rows, -1))}

    def decode(
        self,
        hf: nn.Module,
        embeds_TD: Tensor,
        position_ids_3T: Tensor,
        features_MW: Tensor,
        video_row_M: Tensor,
        layout: PrefixLayout,
        backend: AttentionBackend,
    ) -> Tensor:
        output = self.decoder(hf)(
            **self.decoder_inputs(hf, embeds_TD, features_MW, video_row_M),
            position_ids=position_ids_3T.unsqueeze(1),
            attention_mask={"full_attention": None},  # as a dict it is taken as ready: no [T, T] mask is built
            use_cache=False,
            prefix_layout=layout_to_tensor(layout),
            prefix_backend=backend,
        )
        return output.last_hidden_state.squeeze(0)  # the gradient of [0] would be a copy into zeros
