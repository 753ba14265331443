"""What a rollout engine is: prompts in, completions with log-probs out, weights replaceable between calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from vcr1_fast.types import Completion, Prompt, SamplingParams


class RolloutEngine(Protocol):
    """Implementations: local_engine.LocalEngine (this process), sglang_engine.SGLangEngine (processes of their own),
    scripted_engine.ScriptedEngine (tests).
    """

    policy_version: int  # of the weights now loaded; 0 before the first load_weights

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
        """G completions for each prompt, in the order of the prompts. Blocks until all are done."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Replace the weights (checkpoint names, whole tensors) and set policy_version."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
