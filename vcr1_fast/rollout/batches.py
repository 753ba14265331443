"""How many prompts are answered at once: as many as the KV cache of one batch may hold.

In: prompts one by one, as they are built. Out: lists of them, in their order. Called by local_engine and by evaluation,
which so keeps the patches of one batch in memory and not those of all its videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from vcr1_fast.types import Prompt, SamplingParams

Other = TypeVar("Other")


def in_batches(
    items: Iterable[Prompt | Other], sampling: SamplingParams, max_rows: int, max_tokens: int
) -> Iterator[list[Prompt | Other]]:
    """Consecutive items while P prompts of at most L tokens, each with G completions of at most N, keep

        P G <= max_rows   and   P (L + G N) <= max_tokens,

    the positions of the local engine's cache: prompts are padded to the longest and kept once, completions kept one by
    one. A single prompt always is a batch. Items that are no prompts (unreadable samples) go along and take no room.
    """
    batch: list[Prompt | Other] = []
    num_prompts, longest = 0, 0
    new_tokens = sampling.num_completions * sampling.max_new_tokens
    for item in items:
        if isinstance(item, Prompt):
            longer = max(longest, item.token_ids_L.numel())
            rows, tokens = (num_prompts + 1) * sampling.num_completions, (num_prompts + 1) * (longer + new_tokens)
            if num_prompts and (rows > max_rows or tokens > max_tokens):
                yield batch
                batch, num_prompts, longer = [], 0, item.token_ids_L.numel()
            num_prompts, longest = num_prompts + 1, longer
        batch.append(item)
    if batch:
        yield batch
