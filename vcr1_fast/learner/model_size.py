"""Widths, depths and parameter counts of a model, from its `config.json` alone.

Where `model.path` does not exist, those of a public model stand in, by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.learner.families import assumed_type, require_known
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.run.model_folder import CONFIG_FILE, named_folder, read_json
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.video.formats import FORMATS, PATCHES_PER_TOKEN, VideoFormat


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths of a Qwen2.5-VL or a Qwen3-VL, and the parameter counts that follow."""

    source: str  # where the numbers are from
    model_type: str
    hidden: int
    mlp: int
    layers: int
    heads_width: int  # H
    key_width: int  # K, of the keys; the values have as many
    vocab: int
    is_tied: bool
    tower_depth: int
    tower_width: int
    tower_mlp: int
    head_width: int  # E
    tower_positions: int = 0  # learned position embeddings
    num_deepstack: int = 0  # layers of the tower that give features to inner layers of the decoder, through mergers

    @property
    def video(self) -> VideoFormat:
        return FORMATS[self.model_type]

    @property
    def is_qwen3(self) -> bool:
        return self.model_type == "qwen3_vl"

    @property
    def kept_token_bytes(self) -> int:
        """Of a video token whose clip waits for the update, in bfloat16: as pixels, or as a frozen tower left it."""
        return 2 * max(PATCHES_PER_TOKEN * self.video.patch_values, self.hidden * (1 + self.num_deepstack))

    @property
    def layer_params(self) -> int:
        """q, k, v, o, gate, up, down, two norms: 2DH + 2DK + 3DI + 2D. Qwen2.5 has biases of q, k and v, H + 2K; Qwen3
        a norm for the heads of queries and one for those of keys, 2E."""
        d, h, k = self.hidden, self.heads_width, self.key_width
        own = 2 * self.head_width if self.is_qwen3 else h + 2 * k
        return 2 * d * h + 2 * d * k + 3 * d * self.mlp + 2 * d + own

    @property
    def tower_block_params(self) -> int:
        """qkv and projection 4d(d + 1), three MLP matrices with bias 3di + 2i + d, two norms 2d; in Qwen3-VL two
        matrices 2di + i + d, and norms with bias 4d."""
        d, i = self.tower_width, self.tower_mlp
        own = 2 * d * i + i + d + 4 * d if self.is_qwen3 else 3 * d * i + 2 * i + d + 2 * d
        return 4 * d * (d + 1) + own

    @property
    def tower_params(self) -> int:
        """Patch embedding C d, blocks, and the merger: norm d, then (4d)^2 + 4d + 4dD + D. In Qwen3-VL embedding and
        norm have biases, there are position embeddings, and a merger with a norm of 8d for each deepstack layer."""
        d, merged = self.tower_width, PATCHES_PER_TOKEN * self.tower_width
        merger = merged * merged + merged + merged * self.hidden + self.hidden
        ends = self.video.patch_values * d + merger + d
        if self.is_qwen3:
            ends += 2 * d + self.tower_positions * d + self.num_deepstack * (2 * merged + merger)
        return ends + self.tower_depth * self.tower_block_params

    @property
    def root_params(self) -> int:
        """What FSDP2 keeps gathered from forward to backward: embedding, head, last norm, ends of the tower."""
        words = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return words + self.hidden + self.tower_params - self.tower_depth * self.tower_block_params

    @property
    def params(self) -> int:
        return self.root_params + self.layers * self.layer_params + self.tower_depth * self.tower_block_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bfloat16: 2 x 2 bytes x layers x K."""
        return 4 * self.layers * self.key_width


def read_model_config(path: str) -> tuple[dict[str, Any], str]:
    """config.json of the checkpoint at `path`, or one of a public size where there is no such folder; and which it is,
    in words.

    Raises ConfigError when it cannot be read or is of an architecture not known here.
    """
    folder = named_folder(path)
    file = folder / CONFIG_FILE
    if not file.exists() and not folder.exists():
        name = _assumed(Path(path).name)
        return whole_config(PUBLIC_SIZES[name]), f"{name}, assumed because model.path {path!r} does not exist here"
    config = read_json(file)
    require_known(config.get("model_type"), file)
    try:
        model_size(config, str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} does not describe a model ({type(error).__name__}: {error})") from None
    return config, str(file)


def _assumed(name: str) -> str:
    """The entry of PUBLIC_SIZES that stands in for a model of that name."""
    small, large = {"qwen3_vl": ("4B", "8B"), "qwen2_5_vl": ("3B", "7B")}[assumed_type(name)]
    family = "Qwen3-VL" if assumed_type(name) == "qwen3_vl" else "Qwen2.5-VL"
    return f"{family}-{small if small.lower() in name.lower() else large}"


def read_model_size(path: str) -> ModelSize:
    """The sizes in `read_model_config`, and what it raises."""
    return model_size(*read_model_config(path))


def model_size(config: Mapping[str, Any], source: str) -> ModelSize:
    """Newer files nest the decoder's numbers under text_config, the published ones do not."""
    text, tower = config.get("text_config") or config, config["vision_config"]
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    head_width = int(text.get("head_dim") or hidden // heads)
    is_tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelSize(
        source=source,
        model_type=str(config["model_type"]),
        hidden=hidden,
        mlp=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads_width=heads * head_width,
        key_width=int(text["num_key_value_heads"]) * head_width,
        vocab=int(text["vocab_size"]),
        is_tied=is_tied,
        tower_depth=int(tower.get("depth", 32)),
        tower_width=int(tower.get("hidden_size", 1280)),
        tower_mlp=int(tower.get("intermediate_size", 3420)),
        head_width=head_width,
        tower_positions=int(tower.get("num_position_embeddings", 0)),
        num_deepstack=len(tower.get("deepstack_visual_indexes", ())),
    )
