"""Shared-prefix attention by batched problems of one length: in plain torch, or by torch's flash attention for CPUs.

The two problems and the merge are those of `prefix_attention`. Completions are padded to the longest of their group,
so that all of them are one batch. What one batch of problems computes is given as a `Problem`: dense scores (any float
type, any device; the definition), or torch's blocked CPU kernel, which never holds the scores.

Shape letters: T packed tokens, L tokens of a part, H query heads, K key/value heads, r = H / K, C head dimension,
P prompt tokens, G completions, R tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .prefix_layout import PrefixGroup, PrefixLayout


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


@dataclass(frozen=True)
class Problem:
    """A batch of attention problems of one length, forward and backward."""

    attend: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


DENSE = Problem(_attend, _attend_backward)
FLASH_CPU = Problem(_flash_attend, _flash_attend_backward)


def _gather_completions(x_THC: Tensor, group: PrefixGroup, num_repeats: int) -> Tensor:
    """Completion tokens padded to the longest: [T, H, C] -> [K, repeats, G, R, C] (keys have repeats 1)."""
    rows = x_THC[group.prompt_end : group.end].split(group.completion_lens)
    padded_GRHC = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded_GRHC.unflatten(2, (-1, num_repeats)).permute(2, 3, 0, 1, 4)


def _scatter_completions(x_KrGRC: Tensor, group: PrefixGroup, into_RHC: Tensor) -> None:
    """Inverse of _gather_completions, padding dropped, written where it belongs: [sum R, H, C]."""
    into_RKrC = into_RHC.unflatten(1, x_KrGRC.shape[:2])
    for one_RKrC, padded_RKrC in zip(
        into_RKrC.split(group.completion_lens), x_KrGRC.permute(2, 3, 0, 1, 4), strict=True
    ):
        one_RKrC.copy_(padded_RKrC[: one_RKrC.shape[0]])


def _heads_first(x_LHC: Tensor, num_repeats: int) -> Tensor:
    """[L, H, C] -> [K, repeats, L, C]"""
    return x_LHC.unflatten(1, (-1, num_repeats)).permute(1, 2, 0, 3)


def _tokens_first(x_KrLC: Tensor) -> Tensor:
    """[K, repeats, L, C] -> [L, H, C]"""
    return x_KrLC.permute(2, 0, 1, 3).flatten(1, 2)


def _group_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    into: tuple[Tensor, Tensor],
    group: PrefixGroup,
    scale: float,
    problem: Problem,
) -> None:
    """Write out [T, H, C] and merged lse [T, H, 1] of one group, at its place in the row."""
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(group.start, group.prompt_end)
    query_p, key_p, value_p = (_heads_first(x[prompt], n) for x, n in ((query, repeats), (key, 1), (value, 1)))
    out_p, lse_p = problem.attend(query_p, key_p, value_p, scale, True)
    for whole, part in zip(into, (out_p, lse_p.unsqueeze(-1)), strict=True):
        whole[prompt] = _tokens_first(part)
    if group.end == group.prompt_end:
        return

    query_c, key_c, value_c = (_gather_completions(x, group, n) for x, n in ((query, repeats), (key, 1), (value, 1)))
    out_a, lse_a = problem.attend(query_c, key_c, value_c, scale, True)
    out_b, lse_b = problem.attend(query_c.flatten(2, 3), key_p, value_p, scale, False)
    out_b, lse_b = out_b.view_as(out_a), lse_b.view_as(lse_a)
    lse_c = torch.logaddexp(lse_a, lse_b)
    out_c = out_a * torch.exp(lse_a - lse_c).unsqueeze(-1) + out_b * torch.exp(lse_b - lse_c).unsqueeze(-1)
    for whole, part in zip(into, (out_c, lse_c.unsqueeze(-1)), strict=True):
        _scatter_completions(part, group, whole[group.prompt_end : group.end])


def _group_backward(
    grad_out: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
    group: PrefixGroup,
    scale: float,
    problem: Problem,
) -> None:
    """Write dQ, dK, dV [T, heads, C] of one group, at its place in the row. `tensors` is (query, key, value, out, lse
    [T, H, 1]), merged."""
    query, key, value, out, lse = tensors
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(group.start, group.prompt_end)
    query_p, out_p, grad_p, lse_p = (_heads_first(x[prompt], repeats) for x in (query, out, grad_out, lse))
    key_p, value_p = (_heads_first(x[prompt], 1) for x in (key, value))
    dq_p, dk_p, dv_p = problem.attend_backward(grad_p, query_p, key_p, value_p, out_p, lse_p.squeeze(-1), scale, True)
    dk_p, dv_p = dk_p.sum(1, keepdim=True), dv_p.sum(1, keepdim=True)  # query heads that share a key head
    if group.end == group.prompt_end:
        for whole, part in zip(into, (dq_p, dk_p, dv_p), strict=True):
            whole[prompt] = _tokens_first(part)
        return

    query_c, out_c, grad_c, lse_c = (_gather_completions(x, group, repeats) for x in (query, out, grad_out, lse))
    key_c, value_c = (_gather_completions(x, group, 1) for x in (key, value))
    lse_c = lse_c.squeeze(-1)
    dq_a, dk_c, dv_c = problem.attend_backward(grad_c, query_c, key_c, value_c, out_c, lse_c, scale, True)
    flat = [x.flatten(2, 3) for x in (grad_c, query_c, out_c, lse_c)]
    dq_b, dk_b, dv_b = problem.attend_backward(flat[0], flat[1], key_p, value_p, flat[2], flat[3], scale, False)
    dk_p, dv_p = dk_p + dk_b.sum(1, keepdim=True), dv_p + dv_b.sum(1, keepdim=True)
    dk_c, dv_c = dk_c.sum(1, keepdim=True), dv_c.sum(1, keepdim=True)
    dq_c = dq_a.add_(dq_b.view_as(dq_a))
    for whole, part_p, part_c in zip(into, (dq_p, dk_p, dv_p), (dq_c, dk_c, dv_c), strict=True):
        whole[prompt] = _tokens_first(part_p)
        _scatter_completions(part_c, group, whole[group.prompt_end : group.end])


@dataclass(frozen=True)
class BatchedAttention:
    """Back ends `torch` (DENSE) and, on CPUs, `flash` (FLASH_CPU), group after group.

    DENSE holds the scores of one group at a time: H (P^2 + sum R P + G R^2) numbers. FLASH_CPU holds none.
    """

    problem: Problem

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [T, H, C] and the natural-log lse [H, T], in the type of the inputs."""
        out_THC = torch.empty(query_THC.shape, dtype=query_THC.dtype, device=query_THC.device)
        lse_HT = out_THC.new_empty(query_THC.shape[1], query_THC.shape[0])
        into = (out_THC, lse_HT.T.unsqueeze(-1))
        for group in layout:
            _group_forward(query_THC, key_TKC, value_TKC, into, group, scale, self.problem)
        return out_THC, lse_HT

    def backward(
        self,
        grad_THC: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        layout: PrefixLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV; `tensors` is (query, key, value, out, lse_HT) as `forward` took and gave them."""
        query, key, value, out, lse_HT = tensors
        grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
        with_lse_TH1 = (query, key, value, out, lse_HT.T.unsqueeze(-1))
        for group in layout:
            _group_backward(grad_THC, with_lse_TH1, grads, group, scale, self.problem)
        return grads
