"""What differs between architectures, one object for each; packing, loop and objective do not know which one it is.

Two places are wider than the first family needs. What a tower gives has a width of its own, so that features for
inner layers (Qwen3-VL's deepstack) can lie beside a video token's embedding and are kept with it. And `decode` gets the
layout of the row, so that a recurrent layer can carry the state at a prompt's end into each of its completions.

Shape letters: P patches, C values of a patch, M video tokens, W width of what the tower gives for one of them
(D, and more where inner layers get features), T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from vcr1_kernels.prefix_attention import AttentionBackend, PrefixLayout

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
        return replace(self, tensors={name: tensors[name] for name in self.tensors})


@dataclass(frozen=True, slots=True)
class TowerWork:
    """What a vision tower does for its clips, forward."""

    num_blocks: int
    patch_flop: float  # matrix products of a patch
    window_flop: float  # attention of a patch within its window, over all blocks that have windows
    pair_flop: float  # attention of a pair of patches of one frame pair, over all blocks that see whole ones


class ModelFamily(Protocol):
    """One architecture of Hugging Face's transformers. Stateless."""

    @property
    def model_type(self) -> str: ...

    @property
    def model_class(self) -> type[PreTrainedModel]: ...

    @property
    def video(self) -> VideoFormat:
        """What it is shown of a video."""
        ...

    @property
    def tower_name(self) -> str:
        """Of the vision tower among the model's modules."""
        ...

    @property
    def layers_name(self) -> str:
        """Of the list of decoder layers among the model's modules."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The matrices of a decoder layer that get an adapter where no setting says which."""
        ...

    @property
    def operators(self) -> ModelOperators:
        """The modules whose work kernels can do."""
        ...

    def module_name(self, name: str) -> str:
        """A weight's name in the model's state dict, from its name in a checkpoint, published or saved by modules."""
        ...

    def checkpoint_name(self, name: str) -> str:
        """A weight's name in the published checkpoints, from its name in the state dict (or that name itself)."""
        ...

    def video_token_id(self, config: Any) -> int:
        """The placeholder of a video token in a prompt."""
        ...

    def media_rows(self, token_ids: Tensor, config: Any) -> Tensor:
        """[M] int64: where the placeholders of videos and images lie among these ids, counted through all rows."""
        ...

    def feature_width(self, config: Any) -> int:
        """W."""
        ...

    def build_tower(self, config: Any) -> Any:
        """A vision tower alone, of the configuration of a whole model, with the attention that CPUs run."""
        ...

    def tower(self, hf: nn.Module) -> Any:
        """The vision tower of a whole model, a PreTrainedModel."""
        ...

    def decoder(self, hf: nn.Module) -> Any:
        """The language model without its head, a PreTrainedModel."""
        ...

    def tower_parts(self, hf: nn.Module) -> list[nn.Module]:
        """The tower's blocks and its projector, in the order in which they run."""
        ...

    def tower_work(self, config: Any) -> TowerWork:
        """`config`: of a whole model."""
        ...

    def tower_inputs(self, grids: Sequence[Grid], config: Any) -> TowerInputs:
        """For videos of these grids, one after the other. `config`: of the tower. Nothing but host arithmetic."""
        ...

    def run_tower(self, tower: nn.Module, values_PC: Tensor, inputs: TowerInputs) -> Tensor:
        """[M, W]. All tensors on the tower's device; waits for nothing."""
        ...

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
        ...

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
        ...
