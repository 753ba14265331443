"""A random Qwen2 of two layers that the drop-ins score with."""

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

WIDTH = 32


def tiny_qwen2(vocab_size: int, **more: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **more,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # logits of spread 2: far from uniform, so a wrong temperature or gradient shows
        model.lm_head.weight.normal_(std=2.0 / WIDTH**0.5)
    return model
