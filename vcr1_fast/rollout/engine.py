"""What a rollout engine is: prompts in, completions with log-probs out, weights replaceable between calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vcr1_fast.types import Completion, Prompt, SamplingParams

Begun = Sequence[Sequence[Completion]]  # what an interrupted call gave: G completions of each prompt
NOT_BEGUN = Completion(torch.zeros(0, dtype=torch.int64), torch.zeros(0), "aborted")


def is_done(completions: Sequence[Completion]) -> bool:
    """Whether none of a prompt's completions is to be gone on with."""
    return all(completion.finish_reason != "aborted" for completion in completions)


@dataclass(frozen=True)
class Quota:
    """When a call has answered enough: `num_prompts` prompts, among them the first `num_required` <= `num_prompts`."""

    num_prompts: int
    num_required: int = 0

    def is_met(self, are_done: Sequence[bool]) -> bool:
        """`are_done`: by prompt, whether all its completions are finished."""
        return all(are_done[: self.num_required]) and sum(are_done) >= self.num_prompts

    def taken(self, are_done: Sequence[bool]) -> list[int]:
        """Places of the prompts that count, once it is met: the first that are done."""
        return [place for place, done in enumerate(are_done) if done][: self.num_prompts]


class RolloutEngine(Protocol):
    """Implementations: local_engine.LocalEngine (this process), sglang_engine.SGLangEngine (processes of their own)."""

    @property
    def policy_version(self) -> int:
        """Of the weights now loaded; 0 before the first load_weights."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Begun | None = None,
        quota: Quota | None = None,
    ) -> list[list[Completion]]:
        """G completions for each prompt, in the order of the prompts. Blocks until all are done, or `interrupt`.

        `begun`: what a call that was cut short gave for these prompts. Its finished completions come back as they are;
        the others are gone on with, so that each token has the log-prob of the weights that drew it.
        `quota`: come back as soon as it is met, as after `interrupt`.
        """
        ...

    def interrupt(self) -> None:
        """Called while another thread is in `generate`: it returns soon, unfinished completions as "aborted". Without
        such a call it does nothing."""
        ...

    def release_memory(self) -> None:
        """Lend what the learner can use to it, until the next load_weights. Not during `generate`; may do nothing."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Replace the weights (checkpoint names, whole tensors) and set policy_version. Not during `generate`."""
        ...

    @property
    def version(self) -> str:
        """Name and version of what draws, for records. Example: "sglang 0.5.21"."""
        ...

    def metrics(self) -> dict[str, float]:
        """What happened since the start, to be added up over ranks; may be empty."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
