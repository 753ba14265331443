"""What a policy loss takes besides the log-probs: per-token vectors of whole sequences, to be cut into chunks.

Shape letters: N tokens of all sequences one after the other, M chosen tokens.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TokenVectors:
    """Per-token inputs of a policy loss besides the log-prob; each [N], the tokens of a sequence adjacent.

    A masked token has no row here. `weight_N` weighs the policy term and is a constant of the optimizer step, as are
    `kl_weight_N` and `entropy_weight_N` (None: `weight_N`); no normaliser is computed inside a loss.

    Raises ValueError for vectors of unequal length or lengths that do not sum to N.
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

    def __post_init__(self) -> None:
        num_tokens = self.advantage_N.numel()
        for name, vector_N in self._vectors().items():
            if tuple(vector_N.shape) != (num_tokens,):
                raise ValueError(f"{name} is {tuple(vector_N.shape)}, wanted ({num_tokens},) as advantage_N")
        if self.sequence_lens is not None and sum(self.sequence_lens) != num_tokens:
            raise ValueError(f"sequence_lens sum to {sum(self.sequence_lens)}, wanted the {num_tokens} tokens given")

    def _vectors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sequence_lens"}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor], sequence_lens: tuple[int, ...] | None) -> TokenVectors:
        """The same vectors after `change`, for sequences of the lengths that are then theirs."""
        changed: dict[str, Any] = {name: change(vector_N) for name, vector_N in self._vectors().items()}
        return TokenVectors(**changed, sequence_lens=sequence_lens)

    def rows(self, start: int, stop: int) -> TokenVectors:
        """Tokens start to stop - 1 as views. Raises ValueError when sequence_lens are given and one would be cut."""
        lens = None
        if self.sequence_lens is not None:
            ends = [0, *accumulate(self.sequence_lens)]
            for place in (start, stop):
                if place not in ends:
                    after = bisect(ends, place)
                    raise ValueError(
                        f"rows({start}, {stop}) cuts a sequence at {place}, wanted ends of sequences, such as "
                        f"{ends[max(after - 1, 0)]} or {ends[min(after, len(ends) - 1)]}; for a loss that is not "
                        "sequence-level leave sequence_lens out"
                    )
            begins = zip(ends, self.sequence_lens, strict=False)
            lens = tuple(size for begin, size in begins if size and start <= begin < stop)
        return self.map(lambda vector_N: vector_N[start:stop], lens)

    def select(self, keep_N: Tensor) -> TokenVectors:
        """The tokens where keep_N ([N] bool) is true. With sequence_lens one copy from device to host."""
        lens = None
        if self.sequence_lens is not None:
            kept = keep_N.tolist()
            ends = list(accumulate(self.sequence_lens))
            lens = tuple(sum(kept[end - size : end]) for end, size in zip(ends, self.sequence_lens, strict=True))
        return self.map(lambda vector_N: vector_N[keep_N], lens)


LossFunction = Callable[[Tensor, Tensor, TokenVectors], tuple[Tensor, dict[str, Tensor]]]
"""(logprob_N, entropy_N, tokens) -> (scalar loss, sums): additive over whole sequences, sums without gradient too."""
