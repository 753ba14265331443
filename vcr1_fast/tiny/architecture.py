"""The tiny Qwen2.5-VL: the real architecture (M-RoPE, GQA, windowed and full vision attention), 1.1 M parameters."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The configuration, with the ids of `tokenizer` wired in. Raises KeyError if a special token is missing."""
    ids = tokenizer.get_vocab()
    shared_ids = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
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
        "use_sliding_window": False,
        "initializer_range": 0.05,  # 0.02 is meant for widths in the thousands
        # Sections are cut from high to low frequency: time, row, column. With the usual base 1e6 a head of 32 has no
        # frequency left that tells columns 0..3 apart; at base 30 the slowest still turns 0.04 rad a column.
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [6, 5, 5]},
        **shared_ids,
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 128,
        "initializer_range": 0.05,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        bos_token_id=shared_ids["bos_token_id"],  # pyright: ignore[reportCallIssue]
        eos_token_id=shared_ids["eos_token_id"],  # pyright: ignore[reportCallIssue]
        pad_token_id=shared_ids["pad_token_id"],  # pyright: ignore[reportCallIssue]
    )


def untrained_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A float32 model with random weights. The same configuration and seed give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).float().eval()
