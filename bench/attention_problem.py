"""Attention over `[prompt | c_1 | ... | c_G]`, forward and backward: ours against calls on repeated keys and values.

The repeated way is what PrefixGrouper does: one causal call on the prompt, one call per completion on the prompt's keys
and values, copied for each completion, followed by its own.

Shape letters: T packed tokens, H query heads, K key heads, C head dimension, P prompt, R completion, G completions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vcr1_kernels.prefix_attention import PrefixGroup, prefix_attention

from bench.harness import Absent, Outputs, Way

OUR_BACKENDS = ("auto", "flash", "triton", "torch")


@dataclass(frozen=True)
class AttentionSize:
    model: str
    num_heads: int
    num_key_heads: int
    head_dim: int
    prompt_len: int
    completion_len: int
    num_completions: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.num_completions * self.completion_len

    @property
    def name(self) -> str:
        return f"{self.model} P={self.prompt_len} R={self.completion_len} G={self.num_completions}"


@dataclass(frozen=True)
class AttentionProblem:
    size: AttentionSize
    query_THC: Tensor
    key_TKC: Tensor
    value_TKC: Tensor
    grad_THC: Tensor

    @property
    def scale(self) -> float:
        return self.size.head_dim**-0.5


def make_attention_problem(size: AttentionSize, dtype: torch.dtype, device: torch.device) -> AttentionProblem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        shape = (size.num_tokens, num_heads, size.head_dim)
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return AttentionProblem(
        size, normal(size.num_heads), normal(size.num_key_heads), normal(size.num_key_heads), normal(size.num_heads)
    )


def _gradients(
    problem: AttentionProblem, attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype | None = None
) -> Outputs:
    leaves = [
        x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (problem.query_THC, problem.key_TKC, problem.value_TKC)
    ]
    out_THC = attend(*leaves)
    grads = torch.autograd.grad(out_THC, leaves, problem.grad_THC.to(out_THC.dtype))
    return {"out": out_THC, "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2]}


def attention_reference(problem: AttentionProblem) -> Outputs:
    """Separate dense calls in float64 (float32 on a GPU), the prompt's gradients added up by autograd."""
    wide = torch.float32 if problem.query_THC.is_cuda else torch.float64
    return _gradients(problem, lambda q, k, v: _dense_parts(problem, q, k, v), wide)


def _dense_parts(problem: AttentionProblem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    size, parts = problem.size, []
    prompt_len, length = size.prompt_len, size.completion_len
    parts.append(_dense(query[:prompt_len], key[:prompt_len], value[:prompt_len], problem.scale))
    for start in range(prompt_len, size.num_tokens, length):
        own = slice(start, start + length)
        keys, values = (torch.cat([x[:prompt_len], x[own]]) for x in (key, value))
        parts.append(_dense(query[own], keys, values, problem.scale))
    return torch.cat(parts)


def _dense(query_LHC: Tensor, key_SKC: Tensor, value_SKC: Tensor, scale: float) -> Tensor:
    """Causal attention of the last L of S positions."""
    repeats = query_LHC.shape[1] // key_SKC.shape[1]
    query, key, value = (
        x.transpose(0, 1).unsqueeze(0)
        for x in (query_LHC, *(y.repeat_interleave(repeats, 1) for y in (key_SKC, value_SKC)))
    )
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        position_S = torch.arange(num_keys, device=query.device)
        visible_LS = position_S[None] <= position_S[num_keys - num_queries :, None]
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible_LS, scale=scale)
    return out[0].transpose(0, 1)


def _flash_varlen(
    qkv: tuple[Tensor, Tensor, Tensor], query_lens: list[int], key_lens: list[int], scale: float
) -> Tensor:
    """torch's built-in flash attention on segments of unequal length, causal from the lower right corner."""
    device = qkv[0].device
    ends = [
        torch.tensor([0, *lens], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lens in (query_lens, key_lens)
    ]
    flash: Any = torch.ops.aten._flash_attention_forward
    return flash(*qkv, *ends, max(query_lens), max(key_lens), 0.0, True, False, scale=scale)[0]


def _behind_prompts(size: AttentionSize, packed: Tensor) -> Tensor:
    """[P + G R, ...] to [G, P + R, ...]: each completion behind a copy of the prompt."""
    prompt, own = packed[: size.prompt_len], packed[size.prompt_len :]
    count, length = size.num_completions, size.completion_len
    return torch.cat([prompt.expand(count, -1, -1, -1), own.unflatten(0, (count, length))], dim=1)


def _repeated(problem: AttentionProblem) -> Outputs:
    """Two flash calls; on a CPU, where that kernel does not exist, the same problems through torch's own attention."""
    size = problem.size
    prompt_len, length, count = size.prompt_len, size.completion_len, size.num_completions

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.is_cuda:
            return _dense_parts(problem, query, key, value)
        prompt = (query[:prompt_len], key[:prompt_len], value[:prompt_len])
        out_prompt = _flash_varlen(prompt, [prompt_len], [prompt_len], problem.scale)
        repeated = [_behind_prompts(size, x).flatten(0, 1) for x in (key, value)]
        completions = (query[prompt_len:], repeated[0], repeated[1])
        out = _flash_varlen(completions, [length] * count, [prompt_len + length] * count, problem.scale)
        return torch.cat([out_prompt, out])

    return _gradients(problem, attend)


def _separate_rows(problem: AttentionProblem) -> Outputs:
    """G whole rows of P + R, as without sharing. The prompt's outputs are the first row's, so values compare."""
    size, prompt_len = problem.size, problem.size.prompt_len

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (_behind_prompts(size, x).transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=problem.scale, enable_gqa=True)
        out_GLHC = out.transpose(1, 2)
        return torch.cat([out_GLHC[0, :prompt_len], out_GLHC[:, prompt_len:].flatten(0, 1)])

    return _gradients(problem, attend)


def attention_ways(problem: AttentionProblem) -> tuple[list[Way], list[Absent]]:
    size = problem.size
    layout = (PrefixGroup(0, size.prompt_len, (size.completion_len,) * size.num_completions),)
    function: Any = prefix_attention

    def ours(backend: str) -> Outputs:
        return _gradients(problem, lambda q, k, v: function(q, k, v, layout, problem.scale, backend=backend))

    ways = [Way(f"vcr1 {backend}", lambda backend=backend: ours(backend)) for backend in OUR_BACKENDS]
    ways.append(Way("two calls on repeated K/V", lambda: _repeated(problem)))
    ways.append(Way("separate rows", lambda: _separate_rows(problem)))
    flex = Absent("FlexAttention mask", "not run: torch.compile of one shape takes longer than the whole measurement")
    return ways, [flex]
