"""Qwen2.5-VL: windowed vision tower, one embedding for a video token, M-RoPE.

Shape letters: P patches, C values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.vision_utils import get_vision_window_index

from vcr1_fast.learner.families.family import Grid, ModelFamily, TowerInputs
from vcr1_fast.learner.model_operators import ModelOperators, RotaryCall
from vcr1_fast.learner.tower_attention import TowerSegments
from vcr1_fast.video.formats import QWEN2_5_VL

# transformers names the parts of the model by its modules, the published checkpoints and other engines by these.
_RENAMED = {"model.visual.": "visual.", "model.language_model.": "model."}


class Qwen25VL(ModelFamily):
    model_type = "qwen2_5_vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    tower_class = modeling.Qwen2_5_VisionTransformerPretrainedModel
    video = QWEN2_5_VL
    operators = ModelOperators(
        norms=(modeling.Qwen2_5_VLRMSNorm,),
        mlps=(modeling.Qwen2MLP, modeling.Qwen2_5_VLMLP),
        text=RotaryCall(modeling.Qwen2_5_VLAttention, ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")),
        tower=RotaryCall(modeling.Qwen2_5_VLVisionAttention, ("apply_rotary_pos_emb_vision",)),
    )
    num_tower_mlp_matrices = 3

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

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        inputs = super().tower_inputs(grids, config)
        window_index, cu_window_seqlens = get_vision_window_index(
            inputs.tensors["grid_thw"],
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        tensors = {"window_index": window_index, "cu_window_seqlens": cu_window_seqlens}
        return inputs.beside(tensors, window=tuple(cu_window_seqlens.diff().tolist()))

    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        # Everything is given, so that nothing of it is computed from a grid on the device, which would wait for it.
        # Newer releases take the longest lengths, older ones hand them on; our attention reads `tower_segments`, and no
        # other looks at them: the same number each time, for which no block has to be compiled anew.
        output = tower(
            values_PC,
            **inputs.tensors,
            max_seqlen=1,
            max_window_seqlen=1,
            tower_segments=TowerSegments.of_lengths(**inputs.lengths),
        )
        return output.pooler_output
