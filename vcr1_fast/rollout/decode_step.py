"""One token more for each row of the local engine: ids [B] -> logits [B, V], in few operators.

What transformers' decoder does, written for one token and rows whose keys and values are in a `GroupedCache`: fused
projections, residuals added by the matrix products, rotary rows from a table, no copy of the prompt. On a CPU or a
small model the operators' own cost is most of a token's time. The tests hold it to the stock forward.

Shape letters: B = P * G rows, P prompts, G completions, V vocabulary, D hidden, K key heads, g queries of one of them,
h = K * (g + 2) heads of queries, keys and values, E head width, N rotary positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vcr1_fast.rollout.grouped_cache import GroupedCache
from vcr1_fast.types import RunError

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_COMMON = {
    *(f"{name}.weight" for name in _PROJECTIONS),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *("self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"),
}
_BIASES = {f"{name}.bias" for name in _PROJECTIONS}
_HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
_WEIGHTS = {"Qwen2.5": _COMMON | _BIASES, "Qwen3": _COMMON | _HEAD_NORMS}


class DecodeStep:
    """The decoder and the head of a model, which go on holding their weights: loads in place are seen."""

    def __init__(self, decoder: Any, head: Any) -> None:
        """Lays projections of the same input behind one another in memory. Raises ValueError for layers of another
        kind than Qwen2.5's and Qwen3's."""
        self._embed, self._rotary, self._head = decoder.embed_tokens, decoder.rotary_emb, head
        self._layers = [_Layer(layer) for layer in decoder.layers]
        self._norm = decoder.norm

    def rotary_rows(self, first: int, num_positions: int) -> Tensor:
        """[N, 2, E]: cosines and signed sines of positions. A new token's three axes are one, so M-RoPE has one row."""
        weight = self._embed.weight
        position_N = torch.arange(first, first + num_positions, device=weight.device)
        # [1, N, E], or [3, 1, N, E] of releases that mix the axes later
        cos_NE, sin_NE = (x.flatten(0, -3)[0] for x in self._rotary(weight, position_N.expand(3, 1, -1)))
        sign_E = torch.ones_like(sin_NE[0])
        sign_E[: sign_E.numel() // 2] = -1  # the turned vector is [-second half | first half]
        return torch.stack([cos_NE, sin_NE * sign_E], dim=1)

    def __call__(self, token_B: Tensor, cache: GroupedCache) -> Tensor:
        """[B, V]. To be called after `cache.begin_token`; calling it twice changes nothing."""
        row_P2E = cache.rotary_N2E.index_select(0, cache.first_row_P + cache.slot_1)
        cos_P11E, sin_P11E = row_P2E.unsqueeze(1).split(1, dim=2)
        hidden_BD = self._embed(token_B)
        for index, layer in enumerate(self._layers):
            hidden_BD = layer(index, hidden_BD, cos_P11E, sin_P11E, cache)
        return self._head(_normalised(hidden_BD, self._norm))


class CapturedStep:
    """A `DecodeStep` on CUDA that is recorded once for each set of buffers and then costs the host one launch a token.

    One for each batch: what it holds is let go with it.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        self._buffers: object = None  # of the cache, when the graph was recorded
        self._token_B = self._logits_BV = torch.empty(0)

    def __call__(self, token_B: Tensor, cache: GroupedCache) -> Tensor:
        """As `DecodeStep`; what it gives is overwritten by the next call. Raises RunError where the recorded step does
        not give what the step itself does."""
        if self._buffers is cache.layers:
            self._token_B.copy_(token_B)
            self._graph.replay()
            return self._logits_BV
        self._buffers, self._token_B = cache.layers, token_B.clone()
        want_BV = self._step(self._token_B, cache)  # also what a first call sets up, which must not be recorded
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, a learner's or NCCL's, may call what a capture must not
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits_BV = self._step(self._token_B, cache)
        self._graph.replay()
        bound = 1e-2 * float(want_BV.abs().max())
        is_finite = math.isfinite(bound)  # else the engine says that the weights diverged
        if is_finite and not torch.allclose(self._logits_BV, want_BV, rtol=1e-2, atol=bound):
            raise RunError("a decode step gives other logits as a CUDA graph: set rollout.cuda_graph to false")
        return self._logits_BV


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any) -> None:
        names = {name for name, _ in layer.named_parameters()}
        if names not in _WEIGHTS.values():
            raise ValueError(
                f"a decoder layer has the weights {sorted(names)}, wanted those of {' or '.join(_WEIGHTS)}: "
                f"{sorted(_COMMON)} and {sorted(_BIASES)} or {sorted(_HEAD_NORMS)}; for others set rollout.engine to "
                "sglang"
            )
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self._qkv_XD = _fused(q.weight, k.weight, v.weight)
        self._qkv_bias_X = None if q.bias is None else _fused(q.bias, k.bias, v.bias)
        self._head_norms: tuple[Any, Any] | None = None if q.bias is not None else (attention.q_norm, attention.k_norm)
        self._output_XD = attention.o_proj.weight.t()
        self._gate_up_DX = _fused(mlp.gate_proj.weight, mlp.up_proj.weight).t()
        self._down_XD = mlp.down_proj.weight.t()
        self._norms: tuple[Any, Any] = layer.input_layernorm, layer.post_attention_layernorm
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn
        self._scaling: float = attention.scaling
        self._width: int = attention.head_dim
        self._queries: int = attention.num_key_value_groups
        self._key_heads: int = q.out_features // (self._queries * self._width)

    def __call__(self, index: int, hidden_BD: Tensor, cos: Tensor, sin: Tensor, cache: GroupedCache) -> Tensor:
        attended_BX = self._attended(index, _normalised(hidden_BD, self._norms[0]), cos, sin, cache)
        hidden_BD = torch.addmm(hidden_BD, attended_BX, self._output_XD)
        gate_BX, up_BX = (_normalised(hidden_BD, self._norms[1]) @ self._gate_up_DX).chunk(2, dim=1)
        return torch.addmm(hidden_BD, self._activation(gate_BX) * up_BX, self._down_XD)

    def _attended(self, index: int, normalised_BD: Tensor, cos: Tensor, sin: Tensor, cache: GroupedCache) -> Tensor:
        heads, queries = self._key_heads, self._queries
        shape = (-1, cache.group_size, heads * (queries + 2), self._width)
        qkv_PGhE = nn.functional.linear(normalised_BD, self._qkv_XD, self._qkv_bias_X).view(shape)
        qk_PGhE, value_PGKE = qkv_PGhE.split((heads * (queries + 1), heads), dim=2)
        if self._head_norms is not None:
            parts = zip(qk_PGhE.split((heads * queries, heads), dim=2), self._head_norms, strict=True)
            qk_PGhE = torch.cat([_normalised(part, norm) for part, norm in parts], dim=2)
        qk_PGhE = torch.addcmul(qk_PGhE * cos, qk_PGhE.roll(self._width // 2, -1), sin)
        query_PGhE, key_PGKE = qk_PGhE.split((heads * queries, heads), dim=2)
        query_PKGgE = query_PGhE.unflatten(2, (heads, queries)).transpose(1, 2).contiguous()
        key_PKG1E, value_PKG1E = (x.transpose(1, 2).unsqueeze(3) for x in (key_PGKE, value_PGKE))
        attended_YgE = cache.attend(index, query_PKGgE, key_PKG1E, value_PKG1E, self._scaling)
        return attended_YgE.view(query_PKGgE.shape).transpose(1, 2).reshape(normalised_BD.shape[0], -1)


def _normalised(hidden_BD: Tensor, norm: Any) -> Tensor:
    return nn.functional.rms_norm(hidden_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fused(*parts: nn.Parameter) -> Tensor:
    """Weights, or biases, of projections of one input, laid behind one another; theirs become parts of the whole."""
    whole = torch.cat([part.data for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place
    return whole
