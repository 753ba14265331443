"""What config.json of the public checkpoints says, for plans where there is no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
PUBLIC_SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": _TOWER | {"out_hidden_size": 2048},
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "vision_config": _TOWER | {"out_hidden_size": 3584},
    },
}

FULL_ATTENTION = (7, 15, 23, 31)  # blocks of the published towers that see whole frames


def whole_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A complete config.json from an entry of PUBLIC_SIZES."""
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
