"""What a policy loss takes besides the log-probs: per-token vectors of whole sequences, to be cut into chunks.

Shape letters: N tokens of all sequences one after the other, S sequences.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .sequences import lens_on
from .upload import upload


@dataclass(frozen=True)
class TokenVectors:
    """Per-token inputs of a policy loss besides the log-prob; each [N], the tokens of a sequence adjacent.

    A masked token has no row here. `weight_N` weighs the policy term and is a constant of the optimizer step, as are
    `kl_weight_N` and `entropy_weight_N` (None: `weight_N`); no normaliser is computed inside a loss.

    Raises ValueError for vectors of unequal length or lengths that do not sum to N, TypeError for what is no tensor.
    """

    advantage_N: Tensor
    weight_N: Tensor
    old_logprob_N: Tensor | None = None
    """Policy that the ratio is taken against; None: the current one (ratio 1)."""
    ref_logprob_N: Tensor | None = None
    """Reference policy, for a KL term."""
    sampling_logprob_N: Tensor | None = None
    """What the rollout engine reported, for rollout correction."""
    sequence_lens: tuple[int, ...] | None = None
    """Tokens of each sequence, >= 0, summing to N; for sequence-level losses."""
    kl_weight_N: Tensor | None = None
    entropy_weight_N: Tensor | None = None
    lens_S: Tensor | None = None
    """`sequence_lens` as int64 on the device of the vectors; None: sent there when a loss needs it."""
    is_zero_on_host: Tensor | None = None
    """`loss.zero_rows` of the same vectors, [N] bool on the host, where a caller has them there as well: the head then
    need not wait for the device to know which rows to leave out. None: it asks the loss."""

    def __post_init__(self) -> None:
        for name, vector_N in self._vectors().items():
            if not isinstance(vector_N, Tensor):
                raise TypeError(f"{name} is a {type(vector_N).__name__}, wanted a torch.Tensor [N]")
        num_tokens = self.advantage_N.numel()
        for name, vector_N in self._vectors().items():
            if tuple(vector_N.shape) != (num_tokens,):
                raise ValueError(f"{name} is {tuple(vector_N.shape)}, wanted ({num_tokens},) as advantage_N")
        lens = self.sequence_lens
        if lens is not None and not (isinstance(lens, tuple | list) and all(hasattr(n, "__index__") for n in lens)):
            raise TypeError(f"sequence_lens are {lens!r}, wanted a tuple of ints, such as tuple(lens.tolist())")
        if lens is not None and min(lens, default=0) < 0:
            raise ValueError(f"sequence_lens hold {min(lens)}, wanted lengths >= 0")
        if self.sequence_lens is not None and sum(self.sequence_lens) != num_tokens:
            raise ValueError(f"sequence_lens sum to {sum(self.sequence_lens)}, wanted the {num_tokens} tokens given")

    def _vectors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_N")}
        return {name: value for name, value in values.items() if value is not None}

    def map(
        self,
        change: Callable[[Tensor], Tensor],
        sequence_lens: tuple[int, ...] | None,
        lens_S: Tensor | None = None,
    ) -> TokenVectors:
        """The same vectors after `change`, for sequences of the lengths that are then theirs."""
        changed: dict[str, Any] = {name: change(vector_N) for name, vector_N in self._vectors().items()}
        return TokenVectors(**changed, sequence_lens=sequence_lens, lens_S=lens_S)

    def lens_on(self, device: torch.device) -> Tensor:
        """`sequence_lens` as the functions of `sequences` take them."""
        assert self.sequence_lens is not None
        return lens_on(self.sequence_lens, device) if self.lens_S is None else upload(self.lens_S, device)

    def rows(self, start: int, stop: int) -> TokenVectors:
        """Tokens start to stop - 1 as views. Raises ValueError when sequence_lens are given and one would be cut."""
        if self.sequence_lens is None:
            return self.map(lambda vector_N: vector_N[start:stop], None)
        ends = [0, *accumulate(self.sequence_lens)]
        for place in (start, stop):
            if place not in ends:
                after = bisect_right(ends, place)
                raise ValueError(
                    f"rows({start}, {stop}) cuts a sequence at {place}, wanted ends of sequences, such as "
                    f"{ends[max(after - 1, 0)]} or {ends[min(after, len(ends) - 1)]}; for a loss that is not "
                    "sequence-level leave sequence_lens out"
                )
        sequences = slice(bisect_right(ends, start) - 1, bisect_left(ends, stop))  # without empty ones at either end
        lens_S = None if self.lens_S is None else self.lens_S[sequences]
        return self.map(lambda vector_N: vector_N[start:stop], self.sequence_lens[sequences], lens_S)


LossFunction = Callable[[Tensor, Tensor, TokenVectors], tuple[Tensor, dict[str, Tensor]]]
"""(logprob_N, entropy_N, tokens) -> (scalar loss, sums): additive over whole sequences, sums without gradient too."""
