"""What the local engine's decoder has seen: keys and values of prompts, and of the tokens of their completions.

Copying the prompt's keys and values G times, as `generate` does, costs G times the memory and G times the reads per
token. Here all G queries of a prompt meet the one copy in a single matrix product; own tokens are kept per row, in
buffers of which each token reads all, so that shapes and addresses stay the same from one token to the next.

Shape letters: P prompts, G completions of one prompt, L prompt tokens (right-padded), C own tokens there is room for,
H query heads, K key heads, g = H / K, E head width, N rotary positions, X = P * K, Y = P * K * G.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH_TOKENS = 64  # that room is made for at once: the buffers are copied once per 64 tokens, and 63 read in vain
Pair = tuple[Tensor, Tensor]  # of keys and of values


class _Layer:
    """Keys and values of one decoder layer."""

    def __init__(self, prefix: Pair, own: Pair) -> None:
        """`prefix`: [P, K, L, E] each; `own`: [P, K, G, C, E] each; all contiguous."""
        self.prefix, self.own = prefix, own
        self.prefix_keys_XEL, self.prefix_values_XLE = prefix[0].flatten(0, 1).mT, prefix[1].flatten(0, 1)
        self.own_keys_YEC, self.own_values_YCE = own[0].flatten(0, 2).mT, own[1].flatten(0, 2)

    def grown(self) -> _Layer:
        def longer(buffer_PKGCE: Tensor) -> Tensor:  # zeros: a weight of 0 on garbage that is not finite would be NaN
            room = buffer_PKGCE.new_zeros(*buffer_PKGCE.shape[:3], GROWTH_TOKENS, buffer_PKGCE.shape[4])
            return torch.cat([buffer_PKGCE, room], dim=3)

        return _Layer(self.prefix, (longer(self.own[0]), longer(self.own[1])))

    def kept(self, prompts_P: Tensor, rows_PG: Tensor) -> _Layer:
        heads_K = torch.arange(self.prefix[0].shape[1], device=prompts_P.device)
        which = (prompts_P[:, None, None], heads_K[:, None], rows_PG[:, None])
        return _Layer((self.prefix[0][prompts_P], self.prefix[1][prompts_P]), (self.own[0][which], self.own[1][which]))


class GroupedCache:
    """`past_key_values` of the forward of P prompts, then the state of decoding G rows of each, one token at a time."""

    def __init__(self, length_P: Tensor, group_size: int, rotary_N2E: Tensor, first_row_P: Tensor) -> None:
        """All tensors on the device, indices in int64.

        Args:
            length_P: tokens of each prompt without padding.
            rotary_N2E: see `DecodeStep.rotary_rows`.
            first_row_P: which of these rows is that of a prompt's first new token.
        """
        self.group_size, self.rotary_N2E, self.first_row_P = group_size, rotary_N2E, first_row_P
        self._length_P = length_P
        self.layers: list[_Layer] = []  # another list whenever buffers are other ones
        self._num_own = 0
        self.slot_1 = torch.zeros_like(length_P[:1])  # place of the token that is being added among its row's own
        self._own_bias_C = self._padding_bias_X1L = torch.empty(0)  # 0, or -inf where there is no token

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> Pair:
        """Called by one attention layer after the other with the prompts' [P, K, L, E]."""
        prompts, heads, _length, width = keys.shape
        room = keys.new_empty(prompts, heads, self.group_size, 0, width)
        self.layers.append(_Layer((keys.contiguous(), values.contiguous()), (room, room)))
        return keys, values

    def begin_decode(self) -> None:
        """To be called once, after the prefill."""
        self._own_bias_C = self.layers[0].prefix[0].new_empty(0)
        self._softmax_dtype = torch.promote_types(self._own_bias_C.dtype, torch.float32)
        self._pad()

    def _pad(self) -> None:
        keys_PKLE = self.layers[0].prefix[0]
        is_padding_PL = torch.arange(keys_PKLE.shape[2], device=keys_PKLE.device) >= self._length_P[:, None]
        bias_PL = keys_PKLE.new_zeros(is_padding_PL.shape).masked_fill_(is_padding_PL, -torch.inf)
        self._padding_bias_X1L = bias_PL.repeat_interleave(keys_PKLE.shape[1], dim=0)[:, None]

    def begin_token(self) -> None:
        """To be called before each token; what it does is all that changes between tokens but the rows' contents."""
        if self._num_own == self._own_bias_C.numel():
            self.layers = [layer.grown() for layer in self.layers]
            room = self._own_bias_C.new_full((GROWTH_TOKENS,), -torch.inf)
            self._own_bias_C = torch.cat([self._own_bias_C, room])
        self.slot_1.fill_(self._num_own)
        self._own_bias_C.index_fill_(0, self.slot_1, 0)
        self._num_own += 1

    def attend(self, index: int, query_PKGqE: Tensor, key_PKG1E: Tensor, value_PKG1E: Tensor, scaling: float) -> Tensor:
        """Append a token to a layer and attend to [prompt | own tokens]: [Y, g, E], for contiguous queries.

        One softmax, in float32 at least, over both parts: the result is that of a cache with the prompt copied G times.
        """
        layer = self.layers[index]
        layer.own[0].index_copy_(3, self.slot_1, key_PKG1E)
        layer.own[1].index_copy_(3, self.slot_1, value_PKG1E)
        length, width = layer.prefix_values_XLE.shape[1:]
        query_YgE = query_PKGqE.flatten(0, 2)
        query_XqE = query_YgE.view(layer.prefix_values_XLE.shape[0], -1, width)  # q = G * g share a prompt's key head
        prefix_score_XqL = torch.baddbmm(self._padding_bias_X1L, query_XqE, layer.prefix_keys_XEL, alpha=scaling)
        own_score_YgC = torch.baddbmm(self._own_bias_C, query_YgE, layer.own_keys_YEC, alpha=scaling)
        score_XqS = torch.cat([prefix_score_XqL, own_score_YgC.view(*prefix_score_XqL.shape[:2], -1)], dim=-1)
        prob_XqS = score_XqS.softmax(dim=-1, dtype=self._softmax_dtype).to(score_XqS.dtype)
        from_prefix_XqE = prob_XqS[..., :length].bmm(layer.prefix_values_XLE)
        own_prob_YgC = prob_XqS[..., length:].view(own_score_YgC.shape)
        return torch.baddbmm(from_prefix_XqE.view(query_YgE.shape), own_prob_YgC, layer.own_values_YCE)

    def keep(self, row_PG: Tensor) -> None:
        """Go on with these rows only, equally many of each prompt that is left: their places among the present ones."""
        prompts_P, rows_PG = row_PG[:, 0] // self.group_size, row_PG % self.group_size
        self.layers = [layer.kept(prompts_P, rows_PG) for layer in self.layers]
        self.group_size, self.first_row_P = row_PG.shape[1], self.first_row_P[prompts_P]
        self._length_P = self._length_P[prompts_P]
        self._pad()
