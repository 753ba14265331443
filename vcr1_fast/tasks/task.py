"""What a task is: how to read its annotations, ask its question, score answers and sum a held-out score up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.types import Example, Truth


class Task(Protocol):
    """One file of `vcr1_fast.tasks` provides one of these. Stateless apart from its settings.

    More members are optional. Two are (examples, answers) -> one bool per answer: `are_readable`, whether `metrics`
    found something in it, and `are_well_formed`, where that is cheaper to say than by the part "format" of `score`.
    `needs_video`: a row without exactly one video is refused; default: rows may show anything, or nothing.
    """

    name: str
    part_names: tuple[str, ...]  # reward parts, for example ("format", "iou")

    def __init__(self, config: TaskConfig) -> None: ...

    def parse_truth(self, row: Mapping[str, object]) -> Truth:
        """The ground truth of one annotation row. Raises ValueError with one clear reason if it is unusable."""
        ...

    def question(self, example: Example) -> str:
        """The user's text."""
        ...

    def target(self, example: Example) -> str:
        """The completion that supervised training teaches, think block included when asked for."""
        ...

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Reward parts of a whole batch of completions in one call: part name -> one value in [0, 1] per answer."""
        ...

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Held-out score, headline metric first; failures stay in the denominator.

        Read by the benchmark's published rule (`benchmark_readers`) whatever the recipe; only `score` wants its format.
        """
        ...

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """Baselines that need no model: name -> one answer per example, to be scored by `metrics`."""
        ...
