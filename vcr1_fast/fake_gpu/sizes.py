"""config.json of models with their public sizes, and of the same models with fewer blocks. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

FULL_ATTENTION = (7, 15, 23, 31)  # blocks of the published towers that see whole frames


def whole_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration from an entry of `learner.public_sizes`."""
    text = {key: value for key, value in sizes.items() if key != "vision_config"} | {
        "use_sliding_window": False,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower = dict(sizes["vision_config"]) | {
        "num_heads": 16,
        "fullatt_block_indexes": list(FULL_ATTENTION),
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }


def num_blocks(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(decoder layers, tower blocks with windows, tower blocks that see whole frames)."""
    text, tower = config.get("text_config") or config, config["vision_config"]
    depth = int(tower.get("depth", 32))
    num_full = len(tower.get("fullatt_block_indexes", FULL_ATTENTION))
    return int(text["num_hidden_layers"]), depth - num_full, num_full


def with_blocks(config: Mapping[str, Any], layers: int, windowed: int, full: int) -> dict[str, Any]:
    """The same model with so many blocks of each kind; those that see whole frames come last."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    text, tower = changed.get("text_config") or changed, changed["vision_config"]
    text["num_hidden_layers"] = text["max_window_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    tower["depth"] = windowed + full
    tower["fullatt_block_indexes"] = list(range(windowed, windowed + full))
    return changed
