"""A KV cache that keeps each prompt once for its G completions, and the attention that reads it; of the local engine.

Copying the prompt's keys and values G times, as `generate` does, costs G times the memory and G times the reads per
token. Here all G queries of a prompt meet the one copy in a single matrix product; their own tokens are kept per row.

Shape letters: P prompts, G completions of one prompt, B = P * G rows, L prompt tokens (right-padded), n new tokens,
H query heads, K key heads, g = H / K, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_ATTENTION = "vcr1_grouped_decode"
GROWTH_TOKENS = 128  # new tokens a buffer grows by: one copy per 128 tokens, where torch.cat copies all at every token


class _Layer:
    """Keys and values of one decoder layer."""

    def __init__(self, prefix_keys_PKLE: Tensor, prefix_values_PKLE: Tensor) -> None:
        self.prefix = (prefix_keys_PKLE, prefix_values_PKLE)
        self._buffers: tuple[Tensor, Tensor] | None = None  # [B, K, capacity, E] each

    def append(self, keys_BK1E: Tensor, values_BK1E: Tensor, num_before: int) -> tuple[Tensor, Tensor]:
        if self._buffers is None or num_before == self._buffers[0].shape[2]:
            self._buffers = (self._grown(0, keys_BK1E), self._grown(1, values_BK1E))
        keys, values = self._buffers
        keys[:, :, num_before] = keys_BK1E[:, :, 0]
        values[:, :, num_before] = values_BK1E[:, :, 0]
        return keys[:, :, : num_before + 1], values[:, :, : num_before + 1]

    def _grown(self, which: int, like_BK1E: Tensor) -> Tensor:
        rows, heads, _, width = like_BK1E.shape
        room = like_BK1E.new_empty(rows, heads, GROWTH_TOKENS, width)
        return room if self._buffers is None else torch.cat([self._buffers[which], room], dim=2)

    def keep(self, prompts_P: Tensor, rows_B: Tensor) -> None:
        self.prefix = (self.prefix[0][prompts_P], self.prefix[1][prompts_P])
        if self._buffers is not None:
            self._buffers = (self._buffers[0][rows_B], self._buffers[1][rows_B])


class GroupedCache:
    """The model's `past_key_values`: the first forward fills the prompts, each later one adds a token per row."""

    def __init__(self, prefix_length_P: Tensor) -> None:
        """`prefix_length_P`: [P] int64, tokens of each prompt without padding."""
        self._prefix_length_P = prefix_length_P
        self._layers: list[_Layer] = []
        self._num_new = -1  # tokens of each row; -1 until the prompts are in
        self.padding_bias_P11L: Tensor | None = None  # 0 or -inf; None when no prompt is padded

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by each attention layer. Prefill: [P, K, L, E] is stored. Decode: [B, K, 1, E] is appended, and the
        row's own keys and values [B, K, n, E] come back."""
        if self._num_new < 0:
            self._layers.append(_Layer(keys, values))
            return keys, values
        return self._layers[layer_idx].append(keys, values, self._num_new - 1)

    def begin_decode(self) -> None:
        """To be called once, after the prefill."""
        self._num_new = 0
        keys_PKLE = self._layers[0].prefix[0]
        length = keys_PKLE.shape[2]
        if bool((self._prefix_length_P < length).any()):
            is_padding_PL = torch.arange(length, device=keys_PKLE.device) >= self._prefix_length_P[:, None]
            bias_PL = torch.zeros(is_padding_PL.shape, dtype=keys_PKLE.dtype, device=keys_PKLE.device)
            self.padding_bias_P11L = bias_PL.masked_fill_(is_padding_PL, -torch.inf)[:, None, None]

    def begin_token(self) -> None:
        """To be called before each forward of one token per row."""
        self._num_new += 1

    def prefix(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, [P, K, L, E] each."""
        return self._layers[layer_idx].prefix

    def keep(self, prompts_P: Tensor, rows_B: Tensor) -> None:
        """Go on with these prompts and rows only: indices into the present ones, equally many rows per prompt."""
        for layer in self._layers:
            layer.keep(prompts_P, rows_B)
        if self.padding_bias_P11L is not None:
            self.padding_bias_P11L = self.padding_bias_P11L[prompts_P]


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    grouped_cache: GroupedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: one token per row over [prompt | own tokens], or SDPA without a cache.

    query [B, H, 1, E], key and value [B, K, n, E] (the row's own tokens) -> [B, 1, H, E].
    Softmax in float32 over both parts together, so the result is that of a cache with the prompt copied G times.
    """
    if grouped_cache is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    assert isinstance(module.layer_idx, int), "decoder layers are numbered"
    prefix_keys_PKLE, prefix_values_PKLE = grouped_cache.prefix(module.layer_idx)
    num_prompts, num_key_heads, prefix_length, width = prefix_keys_PKLE.shape
    rows, num_heads, _, _ = query.shape
    by_row = (rows, num_key_heads, num_heads // num_key_heads, -1)
    by_group = (num_prompts, rows // num_prompts, *by_row[1:])
    merged = (num_prompts, num_key_heads, rows // num_prompts * by_row[2], -1)

    query_BKgE = (query * scaling).reshape(by_row)
    query_PKqE = (
        query_BKgE.view(by_group).transpose(1, 2).reshape(merged)
    )  # q = G * g queries share a prompt's key head
    prefix_score_PKqL = query_PKqE @ prefix_keys_PKLE.transpose(2, 3)
    if grouped_cache.padding_bias_P11L is not None:
        prefix_score_PKqL = prefix_score_PKqL + grouped_cache.padding_bias_P11L
    own_score_BKgn = query_BKgE @ key.transpose(2, 3)
    own_score_PKqn = own_score_BKgn.view(by_group).transpose(1, 2).reshape(merged)
    score_PKqS = torch.cat([prefix_score_PKqL, own_score_PKqn], dim=-1)
    prob_PKqS = score_PKqS.softmax(dim=-1, dtype=torch.float32).to(query.dtype)

    def to_rows(tensor_PKqX: Tensor) -> Tensor:
        split = (num_prompts, num_key_heads, rows // num_prompts, by_row[2], -1)
        return tensor_PKqX.reshape(split).transpose(1, 2).reshape(by_row)

    from_prefix_BKgE = to_rows(prob_PKqS[..., :prefix_length] @ prefix_values_PKLE)
    from_own_BKgE = to_rows(prob_PKqS[..., prefix_length:]) @ value
    return (from_prefix_BKgE + from_own_BKgE).reshape(rows, 1, num_heads, width), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)  # for a stock forward of the same model, as tests do
