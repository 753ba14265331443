"""Groups -> PackedBatch rows `[prompt | c_1 | ... | c_G]`, several groups a row, under a token budget.

A completion of R tokens feeds R - 1 of them: its last token predicts nothing. Its R predictions come from the prompt's
last row (for the first token) and from the R - 1 fed rows, so the prompt's last row is gathered once per completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vcr1_kernels.prefix_attention import PrefixGroup

from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.types import Completion, PackedBatch, Patches, RolloutGroup
from vcr1_fast.video.formats import PATCHES_PER_TOKEN


def num_fed_tokens(completion: Completion) -> int:
    return max(completion.num_tokens - 1, 0)


def num_packed_tokens(group: RolloutGroup) -> int:
    """Tokens the group takes in a row."""
    return group.prompt.token_ids_L.numel() + sum(num_fed_tokens(c) for c in group.completions)


def num_unshared_tokens(group: RolloutGroup) -> int:
    """Tokens of the same group as G separate rows."""
    prompt_len = group.prompt.token_ids_L.numel()
    return sum(prompt_len + num_fed_tokens(c) for c in group.completions)


def assign_rows(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Which groups share a row: best fit, largest first; a group above the budget gets a row of its own.

    Deterministic. Within a row, and by first member between rows, groups keep their order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [r for r in range(len(rows)) if room[r] >= sizes[index]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
            rows[row].append(index)
            room[row] -= sizes[index]
        else:
            rows.append([index])
            room.append(budget - sizes[index])
    return sorted(sorted(row) for row in rows)


def pack(groups: Sequence[RolloutGroup], weights: Sequence[Sequence[float]]) -> PackedBatch:
    """One row out of these groups.

    Args:
        groups: at least one; advantages may be missing (then 0).
        weights: for each group the loss weight of one token of each completion (vcr1_kernels.losses.token_weights).
    """
    token_ids, positions, layout = [], [], []
    rows, targets, sequences, advantages, token_weights, logprobs = [], [], [], [], [], []
    start = num_sequences = 0
    for group, group_weights in zip(groups, weights, strict=True):
        prompt = group.prompt
        prompt_len = prompt.token_ids_L.numel()
        token_ids.append(prompt.token_ids_L)
        positions.append(prompt.position_ids_3L)
        fed_start = start + prompt_len
        for index, completion in enumerate(group.completions):
            num_tokens, num_fed = completion.num_tokens, num_fed_tokens(completion)
            fed_rows = torch.arange(fed_start, fed_start + num_fed)
            token_ids.append(completion.token_ids_R[:num_fed])
            positions.append((prompt.next_position + torch.arange(num_fed)).expand(3, -1))
            if num_tokens:
                rows.append(torch.cat([torch.tensor([start + prompt_len - 1]), fed_rows]))
            targets.append(completion.token_ids_R)
            logprobs.append(completion.logprobs_R)
            sequences.append(torch.full((num_tokens,), num_sequences, dtype=torch.long))
            advantage = group.advantages[index] if group.advantages else 0.0
            advantages.append(torch.full((num_tokens,), advantage, dtype=torch.float32))
            token_weights.append(torch.full((num_tokens,), group_weights[index], dtype=torch.float32))
            fed_start += num_fed
            num_sequences += 1
        layout.append(PrefixGroup(start, prompt_len, tuple(num_fed_tokens(c) for c in group.completions)))
        start = fed_start
    no_rows = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        token_ids_T=torch.cat(token_ids),
        position_ids_3T=torch.cat(positions, dim=1),
        layout=tuple(layout),
        patches=tuple(patches for group in groups for patches in group.prompt.media),
        scored_row_N=torch.cat([no_rows, *rows]),
        target_N=torch.cat([no_rows, *targets]),
        sequence_N=torch.cat([no_rows, *sequences]),
        advantage_N=torch.cat([torch.zeros(0), *advantages]),
        weight_N=torch.cat([torch.zeros(0), *token_weights]),
        engine_logprob_N=torch.cat([torch.zeros(0), *logprobs]),
        num_sequences=num_sequences,
        num_unshared_tokens=sum(num_unshared_tokens(group) for group in groups),
    )


def placeholder(
    family: ModelFamily, config: Any, has_features: bool, device: torch.device, dtype: torch.dtype
) -> PackedBatch:
    """The smallest row that runs what a real one runs; weight 0. For a rank that has fewer rows than another.

    Every rank must run the same collectives, so a rank without work runs this one and adds exactly 0 to every gradient.

    Args:
        config: the Hugging Face configuration of the whole model.
        has_features: clips come as a frozen tower left them, so no rank runs the tower; else every rank runs it.
        device, dtype: of pixels or features, as those of real clips are.
    """
    ids = torch.tensor([family.video_token_id(config)])
    where: Any = {"device": device, "dtype": dtype}
    pixels = torch.zeros(0 if has_features else PATCHES_PER_TOKEN, family.video.patch_values, **where)
    features_MW = torch.zeros(1, family.feature_width(config), **where) if has_features else None
    side = math.isqrt(PATCHES_PER_TOKEN)
    return PackedBatch(
        token_ids_T=ids,
        position_ids_3T=torch.zeros(3, 1, dtype=torch.long),
        layout=(PrefixGroup(0, 1, ()),),
        patches=(Patches(pixels, (1, side, side), 1.0, 2, 1.0, features_MW),),
        scored_row_N=torch.tensor([0]),
        target_N=ids,
        sequence_N=torch.tensor([0]),
        advantage_N=torch.zeros(1),
        weight_N=torch.zeros(1),
        engine_logprob_N=torch.zeros(1),
        num_sequences=0,
        num_unshared_tokens=0,
    )


def with_media(row: PackedBatch, placeholder: PackedBatch) -> PackedBatch:
    """A row of text alone with the placeholder's prompt behind it.

    So every row of every rank runs the tower, or none does. Nothing of that prompt is scored: it adds exactly 0.
    """
    return replace(
        row,
        token_ids_T=torch.cat([row.token_ids_T, placeholder.token_ids_T]),
        position_ids_3T=torch.cat([row.position_ids_3T, placeholder.position_ids_3T], dim=1),
        layout=(*row.layout, PrefixGroup(row.num_tokens, placeholder.num_tokens, ())),
        patches=placeholder.patches,
    )
