"""Shared-prefix attention by one dense problem after the other: in plain torch, or by torch's flash attention for CPUs.

The two problems and the merge are those of `prefix_attention`. What one problem computes is given by two functions:
dense scores (any float type, any device; the definition), or torch's blocked CPU kernel, which never holds the scores.

Shape letters: T packed tokens, L tokens of a part, H query heads, K key/value heads, r = H / K, C head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .flash_routes import Tensors
from .prefix_layout import PrefixLayout


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """[..., Lq, C] x [..., Lk, C] -> [..., Lq, Lk]; causal masks key j > query i (equal lengths)."""
    scores = (query @ key.transpose(-1, -2)) * scale
    if causal:
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention output [..., Lq, C] and log-sum-exp [..., Lq] of one dense problem."""
    scores = _scores(query, key, scale, causal)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse.unsqueeze(-1)) @ value, lse


def _attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one problem, given the merged out [..., Lq, C] and lse [..., Lq]."""
    probs = torch.exp(_scores(query, key, scale, causal) - lse.unsqueeze(-1))
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = probs * (grad_out @ value.transpose(-1, -2) - delta) * scale
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, probs.transpose(-1, -2) @ grad_out


def _as_heads(x: Tensor, leading: torch.Size) -> Tensor:
    """[..., L, C] broadcast to the leading dimensions -> [1, heads, L, C] contiguous."""
    return x.expand(*leading, *x.shape[-2:]).reshape(1, -1, *x.shape[-2:])


def _flash_attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`_attend` by torch's CPU kernel: blocks of scores, never all of them."""
    leading = query.shape[:-2]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_as_heads(x, leading) for x in (query, key, value)), 0.0, causal, scale=scale
    )
    return out.reshape(query.shape), lse.reshape(query.shape[:-1])


def _flash_attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_attend_backward` by torch's CPU kernel; probabilities are exp(S - lse) for the lse that is given."""
    leading = query.shape[:-2]
    heads = [_as_heads(x, leading) for x in (grad_out, query, key, value, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads, lse.reshape(1, -1, lse.shape[-1]).contiguous(), 0.0, causal, scale=scale
    )
    return tuple(grad.reshape(*leading, *grad.shape[-2:]) for grad in grads)  # pyright: ignore[reportReturnType]


def _problems(layout: PrefixLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Rows and keys of each, and whether it is causal: (A) of every group and then its (B)."""
    for group in layout:
        for start, end in group.segments():
            yield slice(start, end), slice(start, end), True
        if group.end > group.prompt_end:
            yield slice(group.prompt_end, group.end), slice(group.start, group.prompt_end), False


def merge_rows(out_THC: Tensor, lse_HT: Tensor, out_b: Tensor, lse_b: Tensor, rows: slice | Tensor) -> None:
    """Add part (B), out_b [n, H, C] and lse_b [H, n], to these rows: in place, in the wider of the two types."""
    lse_a = lse_HT[:, rows].clone()
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).T.unsqueeze(-1) for x in (lse_a, lse_b))
    out_THC[rows] = (out_THC[rows] * weight_a + out_b * weight_b).to(out_THC.dtype)
    lse_HT[:, rows] = lse


def _heads_first(x_LHC: Tensor, num_repeats: int) -> Tensor:
    """[L, H, C] -> [K, repeats, L, C]; keys have repeats 1."""
    return x_LHC.unflatten(1, (-1, num_repeats)).permute(1, 2, 0, 3)


def _tokens_first(x_KrLC: Tensor) -> Tensor:
    """[K, repeats, L, C] -> [L, H, C]"""
    return x_KrLC.permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True)
class DenseAttention:
    """Back ends `torch` (DENSE) and, on CPUs, `flash` (FLASH_CPU).

    DENSE holds the scores of one problem at a time: H P^2 numbers, or H P sum R. FLASH_CPU holds none.
    """

    attend: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [T, H, C] and the natural-log lse [H, T], in the type of the inputs."""
        repeats = query_THC.shape[1] // key_TKC.shape[1]
        out_THC = torch.empty(query_THC.shape, dtype=query_THC.dtype, device=query_THC.device)
        lse_HT = out_THC.new_empty(query_THC.shape[1], query_THC.shape[0])
        for rows, keys, causal in _problems(layout):
            key, value = (_heads_first(x[keys], 1) for x in (key_TKC, value_TKC))
            out, lse = self.attend(_heads_first(query_THC[rows], repeats), key, value, scale, causal)
            out, lse = _tokens_first(out), lse.flatten(0, 1)
            if causal:
                out_THC[rows], lse_HT[:, rows] = out, lse
            else:
                merge_rows(out_THC, lse_HT, out, lse, rows)
        return out_THC, lse_HT

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV; `tensors` is (query, key, value, out, lse_HT) as `forward` took and gave them, merged."""
        query_THC, key_TKC, value_TKC, out_THC, lse_HT = tensors
        repeats = query_THC.shape[1] // key_TKC.shape[1]
        grads = (
            query_THC.new_zeros(query_THC.shape),
            key_TKC.new_zeros(key_TKC.shape),
            value_TKC.new_zeros(value_TKC.shape),
        )
        for rows, keys, causal in _problems(layout):
            grad, query, out = (_heads_first(x[rows], repeats) for x in (grad_THC, query_THC, out_THC))
            key, value = (_heads_first(x[keys], 1) for x in (key_TKC, value_TKC))
            lse = lse_HT[:, rows].unflatten(0, (-1, repeats))
            dq, dk, dv = self.attend_backward(grad, query, key, value, out, lse, scale, causal)
            dk, dv = (x.sum(1, keepdim=True) for x in (dk, dv))  # query heads that share a key head
            for total, which, part in zip(grads, (rows, keys, keys), (dq, dk, dv), strict=True):
                total[which] += _tokens_first(part)
        return grads


DENSE = DenseAttention(_attend, _attend_backward)
FLASH_CPU = DenseAttention(_flash_attend, _flash_attend_backward)
