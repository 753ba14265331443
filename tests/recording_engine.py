"""A rollout engine that only keeps what is pushed to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from vcr1_fast.rollout.engine import Begun
from vcr1_fast.types import Completion, Prompt, SamplingParams


class RecordingEngine:
    def __init__(self) -> None:
        self.policy_version = 0
        self.loaded: dict[str, Tensor] = {}
        self.pushes: list[list[str]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, begun: Begun | None = None
    ) -> list[list[Completion]]:
        raise NotImplementedError

    version = "recording"

    def interrupt(self) -> None: ...

    def release_memory(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        names = []
        for name, weight in weights:
            self.loaded[name] = weight.clone()
            names.append(name)
        self.pushes.append(names)
        self.policy_version = policy_version

    def close(self) -> None:
        self.loaded.clear()
