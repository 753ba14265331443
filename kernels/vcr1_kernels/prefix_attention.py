"""Attention over rows of `[prompt | c_1 | ... | c_G]`: every completion sees the prompt and itself, nothing else.

    row:       prompt     c_1      c_2
    prompt     causal
    c_1        all        causal
    c_2        all                 causal

The prompt's keys and values are used by G completions but exist once. Two dense problems and one merge:

    (A) causal attention inside each segment                          -> out_a, lse_a
    (B) all completion queries of a group against the prompt's keys   -> out_b, lse_b
    lse = logaddexp(lse_a, lse_b);  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

Backward runs the two problems again with the *merged* out and lse, because softmax probabilities relative to the merged
lse are the true ones: P = exp(S - lse), dS = P (dP - sum_c dout out). The prompt's dK and dV are the sums over both.
Letting autograd go through the merge instead needs the gradient of each lse, which flash attention backwards drop.

Shape letters: T packed tokens, H query heads, K key/value heads (H a multiple of K), C head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixGroup:
    """One prompt and its completions in a packed row. Example: `PrefixGroup(0, 4, (2, 3))` covers tokens 0..8."""

    start: int  # first token of the prompt
    prompt_len: int  # >= 1
    completion_lens: tuple[int, ...]  # tokens fed for each completion, in order; 0 is allowed

    @property
    def prompt_end(self) -> int:
        return self.start + self.prompt_len

    @property
    def end(self) -> int:
        return self.prompt_end + sum(self.completion_lens)


PrefixLayout = tuple[PrefixGroup, ...]


def check_layout(layout: PrefixLayout, num_tokens: int) -> None:
    """Groups must follow one another and cover 0..num_tokens. Raises ValueError otherwise."""
    position = 0
    for index, group in enumerate(layout):
        if group.start != position or group.prompt_len < 1 or min(group.completion_lens, default=0) < 0:
            raise ValueError(
                f"layout: group {index} is {group}, wanted start {position}, prompt_len >= 1, completion_lens >= 0"
            )
        position = group.end
    if position != num_tokens:
        raise ValueError(f"layout covers {position} tokens, but the row has {num_tokens}")


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
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one problem, given the merged lse and delta = sum_c grad_out * out, both [..., Lq]."""
    probs = torch.exp(_scores(query, key, scale, causal) - lse.unsqueeze(-1))
    grad_scores = probs * (grad_out @ value.transpose(-1, -2) - delta.unsqueeze(-1)) * scale
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, probs.transpose(-1, -2) @ grad_out


def _gather_completions(x_THC: Tensor, group: PrefixGroup, num_repeats: int) -> Tensor:
    """Completion tokens padded to the longest: [T, H, C] -> [K, repeats, G, R, C] (keys have repeats 1)."""
    rows = x_THC[group.prompt_end : group.end].split(group.completion_lens)
    padded_GRHC = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded_GRHC.unflatten(2, (-1, num_repeats)).permute(2, 3, 0, 1, 4)


def _scatter_completions(x_KrGRC: Tensor, group: PrefixGroup) -> Tensor:
    """Inverse of _gather_completions, padding dropped: -> [sum R, H, C]."""
    padded_GRHC = x_KrGRC.permute(2, 3, 0, 1, 4).flatten(2, 3)
    return torch.cat([padded_GRHC[i, :n] for i, n in enumerate(group.completion_lens)])


def _heads_first(x_LHC: Tensor, num_repeats: int) -> Tensor:
    """[L, H, C] -> [K, repeats, L, C]"""
    return x_LHC.unflatten(1, (-1, num_repeats)).permute(1, 2, 0, 3)


def _tokens_first(x_KrLC: Tensor) -> Tensor:
    """[K, repeats, L, C] -> [L, H, C]"""
    return x_KrLC.permute(2, 0, 1, 3).flatten(1, 2)


def _group_forward(
    query: Tensor, key: Tensor, value: Tensor, group: PrefixGroup, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [L, H, C] of one group; the prompt's lse [K, r, P] and the completions' merged lse [K, r, G, R]."""
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(group.start, group.prompt_end)
    query_p, key_p, value_p = (_heads_first(x[prompt], n) for x, n in ((query, repeats), (key, 1), (value, 1)))
    out_p, lse_p = _attend(query_p, key_p, value_p, scale, causal=True)
    if group.end == group.prompt_end:
        return _tokens_first(out_p), lse_p, None

    query_c, key_c, value_c = (_gather_completions(x, group, n) for x, n in ((query, repeats), (key, 1), (value, 1)))
    out_a, lse_a = _attend(query_c, key_c, value_c, scale, causal=True)
    out_b, lse_b = _attend(query_c.flatten(2, 3), key_p, value_p, scale, causal=False)
    out_b, lse_b = out_b.view_as(out_a), lse_b.view_as(lse_a)
    lse_c = torch.logaddexp(lse_a, lse_b)
    out_c = out_a * torch.exp(lse_a - lse_c).unsqueeze(-1) + out_b * torch.exp(lse_b - lse_c).unsqueeze(-1)
    return torch.cat([_tokens_first(out_p), _scatter_completions(out_c, group)]), lse_p, lse_c


def _group_backward(
    grad_out: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_p: Tensor,
    lse_c: Tensor | None,
    group: PrefixGroup,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one group, each [L, heads, C]. `tensors` is (query, key, value, merged out)."""
    query, key, value, out = tensors
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(group.start, group.prompt_end)
    query_p, out_p, grad_p = (_heads_first(x[prompt], repeats) for x in (query, out, grad_out))
    key_p, value_p = (_heads_first(x[prompt], 1) for x in (key, value))
    delta_p = (grad_p * out_p).sum(-1)
    dq_p, dk_p, dv_p = _attend_backward(grad_p, query_p, key_p, value_p, lse_p, delta_p, scale, causal=True)
    dk_p, dv_p = dk_p.sum(1, keepdim=True), dv_p.sum(1, keepdim=True)  # query heads that share a key head
    if lse_c is None:
        return _tokens_first(dq_p), _tokens_first(dk_p), _tokens_first(dv_p)

    query_c, out_c, grad_c = (_gather_completions(x, group, repeats) for x in (query, out, grad_out))
    key_c, value_c = (_gather_completions(x, group, 1) for x in (key, value))
    delta_c = (grad_c * out_c).sum(-1)
    dq_a, dk_c, dv_c = _attend_backward(grad_c, query_c, key_c, value_c, lse_c, delta_c, scale, causal=True)
    flat = [x.flatten(2, 3) for x in (grad_c, query_c, lse_c, delta_c)]
    dq_b, dk_b, dv_b = _attend_backward(flat[0], flat[1], key_p, value_p, flat[2], flat[3], scale, causal=False)
    dk_p, dv_p = dk_p + dk_b.sum(1, keepdim=True), dv_p + dv_b.sum(1, keepdim=True)
    dk_c, dv_c = dk_c.sum(1, keepdim=True), dv_c.sum(1, keepdim=True)
    return (
        torch.cat([_tokens_first(dq_p), _scatter_completions(dq_a + dq_b.view_as(dq_a), group)]),
        torch.cat([_tokens_first(dk_p), _scatter_completions(dk_c, group)]),
        torch.cat([_tokens_first(dv_p), _scatter_completions(dv_c, group)]),
    )


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        out = torch.empty_like(query)
        lses: list[Tensor] = []
        for group in layout:
            out[group.start : group.end], lse_p, lse_c = _group_forward(query, key, value, group, scale)
            lses += [lse_p, lse_p.new_empty(0) if lse_c is None else lse_c]
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        query, key, value, out, *lses = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for index, group in enumerate(ctx.layout):
            span = slice(group.start, group.end)
            lse_p, lse_c = lses[2 * index], lses[2 * index + 1]
            dq[span], dk[span], dv[span] = _group_backward(
                grad_outputs[0],
                (query, key, value, out),
                lse_p,
                lse_c if lse_c.numel() else None,
                group,
                ctx.scale,
            )
        return dq, dk, dv, None, None


def prefix_attention(
    query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
) -> Tensor:
    """Shared-prefix attention of one packed row, forward and backward, in two dense parts and an LSE merge.

    Args:
        query_THC: [T, H, C]; key_TKC, value_TKC: [T, K, C], H a multiple of K; rotary embedding already applied.
        layout: the groups of the row, covering 0..T.
        scale: factor of the scores, usually C ** -0.5.

    Returns: [T, H, C]. Equal to `reference.prefix_attention`, which is one masked softmax over [T, T].
    FLOPs forward, per group and query head: 4 C (P^2 / 2 + G R P + G R^2 / 2); over G separate rows it is G P^2 / 2.

    Raises: ValueError when the layout does not cover the row, or H is not a multiple of K.
    """
    check_layout(layout, query_THC.shape[0])
    if query_THC.shape[1] % key_TKC.shape[1]:
        raise ValueError(
            f"prefix_attention: {query_THC.shape[1]} query heads, {key_TKC.shape[1]} key heads: wanted a multiple"
        )
    compute_dtype = torch.promote_types(torch.promote_types(query_THC.dtype, value_TKC.dtype), torch.float32)
    # Not under autocast, and float32 at least: a softmax in bfloat16 keeps 2 decimal digits. Rotary embedding hands
    # over float32 queries beside bfloat16 values, so the types may differ.
    with torch.autocast(query_THC.device.type, enabled=False):
        wide = [x.to(compute_dtype) for x in (query_THC, key_TKC, value_TKC)]
        out_THC: Tensor = _PrefixAttention.apply(*wide, layout, scale)  # pyright: ignore[reportAssignmentType]
    return out_THC.to(value_TKC.dtype)
