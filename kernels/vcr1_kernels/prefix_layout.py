"""What a packed row `[prompt | c_1 | ... | c_G]`, group after group, consists of. Host integers only.

Every completion sees the prompt of its group and itself, nothing else:

    row:       prompt     c_1      c_2
    prompt     causal
    c_1        all        causal
    c_2        all                 causal
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

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

    def segments(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 token of the prompt and of each completion with tokens."""
        start = self.start
        for length in (self.prompt_len, *self.completion_lens):
            if length:
                yield start, start + length
            start += length


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


def layout_to_tensor(layout: PrefixLayout) -> Tensor:
    """P, G, R_1 .. R_G of each group as int64 on the host: as a registered op takes it and `prefix_attention` may.

    Inside of torch.compile give that: code compiled for a tuple is compiled anew for every other layout.
    """
    groups = ((group.prompt_len, len(group.completion_lens), *group.completion_lens) for group in layout)
    return torch.tensor([n for numbers in groups for n in numbers], dtype=torch.int64)


@functools.lru_cache(maxsize=64)
def read_layout(numbers: tuple[int, ...], num_tokens: int) -> PrefixLayout:
    """Inverse of `layout_to_tensor`. Example: `(4, 2, 2, 3)` of 9 tokens is `(PrefixGroup(0, 4, (2, 3)),)`.

    Raises ValueError for numbers that are not those of a layout, and as `check_layout` does.
    """
    groups: list[PrefixGroup] = []
    start = index = 0
    while index < len(numbers):
        prompt_len, num_completions = (*numbers[index : index + 2], -1)[:2]
        index += 2 + num_completions
        if num_completions < 0 or index > len(numbers):
            raise ValueError(f"layout: got the numbers {list(numbers)}, wanted P, G, R_1 .. R_G of each group")
        groups.append(PrefixGroup(start, prompt_len, tuple(numbers[index - num_completions : index])))
        start = groups[-1].end
    check_layout(tuple(groups), num_tokens)
    return tuple(groups)
