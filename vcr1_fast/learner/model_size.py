"""Widths, depths and parameter counts of a model, from its `config.json` alone.

Where `model.path` does not exist, the public sizes of Qwen2.5-VL-3B or -7B stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.learner.families import require_known
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.run.model_folder import CONFIG_FILE, cached_config, read_json
from vcr1_fast.settings.config import ConfigError

PATCHES_PER_TOKEN = 4
PATCH_VALUES = 3 * 2 * 14 * 14  # channels x frames x rows x columns


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths of a Qwen2.5-VL, and the parameter counts that follow."""

    source: str  # where the numbers are from
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

    @property
    def layer_params(self) -> int:
        """q, k, v with bias, o, gate, up, down, two norms: 2DH + H + 2(DK + K) + 3DI + 2D."""
        d, h, k = self.hidden, self.heads_width, self.key_width
        return 2 * d * h + h + 2 * (d * k + k) + 3 * d * self.mlp + 2 * d

    @property
    def tower_block_params(self) -> int:
        """qkv and projection 4d(d + 1), three MLP matrices with bias 3di + 2i + d, two norms 2d."""
        d, i = self.tower_width, self.tower_mlp
        return 4 * d * (d + 1) + 3 * d * i + 2 * i + d + 2 * d

    @property
    def tower_params(self) -> int:
        """Patch embedding 1176 d, blocks, and the merger: norm d, then (4d)^2 + 4d + 4dD + D."""
        d, merged = self.tower_width, PATCHES_PER_TOKEN * self.tower_width
        merger = d + merged * merged + merged + merged * self.hidden + self.hidden
        return PATCH_VALUES * d + self.tower_depth * self.tower_block_params + merger

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
    """config.json of the checkpoint at `path` (`tiny`: the packaged one), or one of a public size where there is no
    such folder; and which it is, in words.

    Raises ConfigError when it cannot be read or is of an architecture not known here.
    """
    folder = Path(__file__).parents[1] / "tiny" if path == "tiny" else Path(path).expanduser()
    file = cached_config(path) or folder / CONFIG_FILE
    if not file.exists() and not folder.exists():
        name = "Qwen2.5-VL-3B" if "3b" in Path(path).name.lower() else "Qwen2.5-VL-7B"
        return whole_config(PUBLIC_SIZES[name]), f"{name}, assumed because model.path {path!r} does not exist here"
    config = read_json(file)
    require_known(config.get("model_type"), file)
    try:
        model_size(config, str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} does not describe a model ({type(error).__name__}: {error})") from None
    return config, str(file)


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
    )
