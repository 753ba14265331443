"""Lets the stock Hugging Face text model attend over packed rows `[prompt | c_1 | ... | c_G]`, group after group.

The function is registered under one name with transformers' AttentionInterface; the layout of the row reaches it as the
keyword argument `prefix_layout` of the text model's forward. No model code is forked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vcr1_kernels.prefix_attention import AttentionBackend, PrefixLayout, prefix_attention

PREFIX_ATTENTION, CAUSAL_ATTENTION = "vcr1_prefix", "vcr1_causal"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix_layout: PrefixLayout | Tensor,
    prefix_backend: AttentionBackend = "auto",
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row in the calling convention of transformers.

    Args:
        query: [1, H, T, C]; key, value: [1, K, T, C].
        attention_mask: must be None, the layout says what sees what.

    Returns: ([1, T, H, C], None).
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"packed attention got batch size {query.shape[0]} and a mask of type {type(attention_mask).__name__}, "
            "wanted one row and no mask"
        )
    query_THC, key_TKC, value_TKC = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out_THC = prefix_attention(query_THC, key_TKC, value_TKC, prefix_layout, scaling, prefix_backend)
    return out_THC.unsqueeze(0), None


def use_packed_attention(decoder: Any) -> None:
    """Switch a decoder to packed rows; the vision tower keeps its own attention."""
    AttentionInterface.register(PREFIX_ATTENTION, packed_attention)
    decoder.config._attn_implementation = PREFIX_ATTENTION


def use_causal_attention(decoder: Any) -> None:
    """Switch a decoder to whole prompts, by torch's own attention: under a name for which no [L, L] mask is built."""
    AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
    decoder.config._attn_implementation = CAUSAL_ATTENTION
