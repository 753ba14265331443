"""What config.json of the public checkpoints says, for plans where there is no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_QWEN3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_QWEN3_SMALL_TOWER = _QWEN3_TOWER | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN3 = {"model_type": "qwen3_vl", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
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
    "Qwen3-VL-4B": _QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
        "vision_config": _QWEN3_SMALL_TOWER | {"out_hidden_size": 2560},
    },
    "Qwen3-VL-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "vision_config": _QWEN3_TOWER | {"out_hidden_size": 4096},
    },
}

FULL_ATTENTION = (7, 15, 23, 31)  # blocks of the published towers that see whole frames


_OF_TEXT: dict[str, dict[str, Any]] = {  # the same for all sizes of a family
    "qwen2_5_vl": {
        "use_sliding_window": False,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "qwen3_vl": {
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
}
_OF_TOWER: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"fullatt_block_indexes": list(FULL_ATTENTION), "window_size": 112, "tokens_per_second": 2},
    "qwen3_vl": {},
}


def whole_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A complete config.json from an entry of PUBLIC_SIZES."""
    model_type = sizes.get("model_type", "qwen2_5_vl")
    text = {key: value for key, value in sizes.items() if key not in ("vision_config", "model_type")}
    text |= _OF_TEXT[model_type]
    tower = dict(sizes["vision_config"]) | _OF_TOWER[model_type]
    return {
        "model_type": model_type,
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
