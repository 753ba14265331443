"""The tiny models: real architectures (M-RoPE, GQA, towers with all their kinds of layers), 1.1 M parameters each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

TinyConfig = Qwen2_5_VLConfig | Qwen3VLConfig
TinyModel = Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration


def tiny_config(tokenizer: PreTrainedTokenizerFast, model_type: str = "qwen2_5_vl") -> TinyConfig:
    """The configuration, with the ids of `tokenizer` wired in. Raises KeyError if a special token is missing."""
    ids = tokenizer.get_vocab()
    shared_ids = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    make = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}[model_type]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # 0.02 is meant for widths in the thousands
        # Pairs of columns go to time, row, column: in Qwen2.5-VL from high to low frequency, in Qwen3-VL in turn. With
        # the usual base 1e6 a head of 32 has no frequency left that tells columns 0..3 apart; at base 30 the slowest
        # still turns 0.04 rad a column.
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [6, 5, 5]},
        **shared_ids,
    }
    vision = {
        "depth": 4,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "initializer_range": 0.05,
    }
    of_whole = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        **shared_ids,
    }
    return make(text, vision, of_whole)


def _qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], of_whole: dict[str, Any]) -> Qwen2_5_VLConfig:
    vision |= {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14}
    vision |= {"tokens_per_second": 2, "window_size": 56, "fullatt_block_indexes": [1, 3]}
    architectures = ["Qwen2_5_VLForConditionalGeneration"]
    text |= {"use_sliding_window": False}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, architectures=architectures, **of_whole)


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], of_whole: dict[str, Any]) -> Qwen3VLConfig:
    """Its tower is narrower: four mergers of 61,000 weights each take the place of one."""
    vision |= {"hidden_size": 48, "intermediate_size": 96, "num_heads": 3, "patch_size": 16}
    vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]}  # of 6 x 6 patches, 96 px a side
    text["rope_parameters"] |= {"mrope_interleaved": True}
    text |= {"head_dim": 32}
    architectures = ["Qwen3VLForConditionalGeneration"]
    return Qwen3VLConfig(text_config=text, vision_config=vision, architectures=architectures, **of_whole)


def untrained_model(config: TinyConfig, seed: int) -> TinyModel:
    """A float32 model with random weights. The same configuration and seed give the same weights."""
    is_qwen3 = isinstance(config, Qwen3VLConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config) if is_qwen3 else Qwen2_5_VLForConditionalGeneration(config)
        return model.float().eval()
