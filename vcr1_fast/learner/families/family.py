"""What differs between architectures, one object for each; packing, loop and objective do not know which one it is.

Two places are wider than the first family needs. What a tower gives has a width of its own, so that features for
inner layers (Qwen3-VL's deepstack) can lie beside a video token's embedding and are kept with it. And `decode` gets the
layout of the row, so that a recurrent layer can carry the state at a prompt's end into each of its completions.

Shape letters: P patches, C values of a patch, M video tokens, W width of what the tower gives for one of them
(D, and more where inner layers get features), T packed tokens, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids
from vcr1_kernels.prefix_attention import AttentionBackend, PrefixLayout, layout_to_tensor

from vcr1_fast.learner.model_operators import ModelOperators
from vcr1_fast.video.formats import VideoFormat

Grid = tuple[int, int, int]  # (frame pairs, rows, columns) in patches


@dataclass(frozen=True, slots=True)
class TowerInputs:
    """What a vision tower takes beside the pixels, made on the host from the grids alone."""

    tensors: Mapping[str, Tensor]  # of any type, on the host until `on` puts copies in their place
    lengths: Mapping[str, tuple[int, ...]]  # host numbers: patches of each attention segment, by kind

    def on(self, tensors: Mapping[str, Tensor]) -> TowerInputs:
        """The same with the tensors of these names, from a device."""
        return TowerInputs({name: tensors[name] for name in self.tensors}, self.lengths)

    def beside(self, tensors: Mapping[str, Tensor], **lengths: tuple[int, ...]) -> TowerInputs:
        """The same with these as well."""
        return TowerInputs({**self.tensors, **tensors}, {**self.lengths, **lengths})


@dataclass(frozen=True, slots=True)
class TowerWork:
    """What a vision tower does for its clips, forward."""

    num_blocks: int
    patch_flop: float  # matrix products of a patch
    window_flop: float  # attention of a patch within its window, over all blocks that have windows
    pair_flop: float  # attention of a pair of patches of one frame pair, over all blocks that see whole ones


class ModelFamily(ABC):
    """One architecture of Hugging Face's transformers. Stateless. Methods that have code are the same for most."""

    model_type: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    tower_class: ClassVar[type[PreTrainedModel]]
    video: ClassVar[VideoFormat]  # what it is shown of a video
    operators: ClassVar[ModelOperators]  # the modules whose work kernels can do
    num_tower_mlp_matrices: ClassVar[int]  # of a block of the tower
    tower_name = "model.visual"  # of the vision tower among the model's modules
    layers_name = "model.language_model.layers"  # of the list of decoder layers among them
    # the matrices of a decoder layer that get an adapter where no setting says which
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def module_name(self, name: str) -> str:
        """A weight's name in the model's state dict, from its name in a checkpoint, published or saved by modules."""
        return name

    def checkpoint_name(self, name: str) -> str:
        """A weight's name in the published checkpoints, from its name in the state dict (or that name itself)."""
        return name

    def video_token_id(self, config: Any) -> int:
        """The placeholder of a video token in a prompt."""
        return config.video_token_id

    def media_rows(self, token_ids: Tensor, config: Any) -> Tensor:
        """[M] int64: where the placeholders of videos and images lie among these ids, counted through all rows."""
        is_media = (token_ids == config.video_token_id) | (token_ids == config.image_token_id)
        return is_media.flatten().nonzero().squeeze(1)

    def feature_width(self, config: Any) -> int:
        """W."""
        return config.text_config.hidden_size * (1 + self.num_inner(config))

    def build_tower(self, config: Any) -> Any:
        """A vision tower alone, of the configuration of a whole model, with the attention that CPUs run."""
        config.vision_config._attn_implementation = "sdpa"
        return self.tower_class(config.vision_config)

    def tower(self, hf: Any) -> Any:
        """The vision tower of a whole model, a PreTrainedModel."""
        return hf.model.visual

    def decoder(self, hf: Any) -> Any:
        """The language model without its head, a PreTrainedModel."""
        return hf.model.language_model

    def tower_parts(self, hf: Any) -> list[nn.Module]:
        """The tower's blocks and its projector, in the order in which they run."""
        return [*self.tower(hf).blocks, self.tower(hf).merger]

    def tower_work(self, config: Any) -> TowerWork:
        """`config`: of a whole model. Letters: d width, i MLP width, m MLP matrices, K features for inner layers.

        A patch's products: embedding, blocks (4 d d + m d i), its share of the 1 + K mergers. Pairs of a patch: its
        window, where a few are fewer at a frame's edges, or its frame in blocks that have none.
        """
        tower = config.vision_config
        width, merged = tower.hidden_size, tower.spatial_merge_size**2 * tower.hidden_size
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        block = 4 * width * width + self.num_tower_mlp_matrices * width * tower.intermediate_size
        mergers = (1 + self.num_inner(config)) * width * (merged + tower.out_hidden_size)
        num_full = len(getattr(tower, "fullatt_block_indexes", range(tower.depth)))
        window = (getattr(tower, "window_size", 0) // tower.patch_size) ** 2
        return TowerWork(
            num_blocks=tower.depth,
            patch_flop=2.0 * (values * width + tower.depth * block + mergers),
            window_flop=4.0 * width * window * (tower.depth - num_full),
            pair_flop=4.0 * width * num_full,
        )

    def num_inner(self, config: Any) -> int:
        """Layers of the decoder that get features of their own. `config`: of a whole model."""
        return 0

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        """For videos of these grids, one after the other. `config`: of the tower. Nothing but host arithmetic."""
        grid_thw = torch.tensor(grids, dtype=torch.long)
        position_ids = get_vision_position_ids(grid_thw, config.spatial_merge_size)
        cu_seqlens = get_vision_cu_seqlens(grid_thw)
        tensors = {"grid_thw": grid_thw, "position_ids": position_ids, "cu_seqlens": cu_seqlens}
        return TowerInputs(tensors, {"frame": tuple(cu_seqlens.diff().tolist())})

    @abstractmethod
    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        """[M, W]. All tensors on the tower's device; waits for nothing."""

    def decoder_inputs(
        self, hf: nn.Module, embeds_TD: Tensor, features_MW: Tensor, video_row_M: Tensor, num_rows: int = 1
    ) -> dict[str, Any]:
        """Arguments of the decoder's forward that say what it reads: embeddings, and features for inner layers.

        Args:
            embeds_TD: of the tokens of all rows, one behind the other; video tokens are put in here, from the first D
                columns of features_MW.
            video_row_M: their places among the T.
            num_rows: rows of the batch, T / num_rows tokens each.
        """
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
        """Final hidden states [T, D] of a packed row; the rest as in `decoder_inputs`."""
        output = self.decoder(hf)(
            **self.decoder_inputs(hf, embeds_TD, features_MW, video_row_M),
            position_ids=position_ids_3T.unsqueeze(1),
            attention_mask={"full_attention": None},  # as a dict it is taken as ready: no [T, T] mask is built
            use_cache=False,
            prefix_layout=layout_to_tensor(layout),
            prefix_backend=backend,
        )
        return output.last_hidden_state.squeeze(0)  # the gradient of [0] would be a copy into zeros
