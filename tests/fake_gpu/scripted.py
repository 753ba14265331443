"""The scripted engine for a whole run on fake GPUs: answers with rewards that differ, without a GPU's values."""

from __future__ import annotations

from collections.abc import Sequence

from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.run.run import Run

ANSWERS = 2 * ("<think>0: still</think><answer>0.0 to 1.0</answer>", "no idea")  # of which one has the form


class _Alike(dict[str, Sequence[str]]):
    """The same answers to every example."""

    def get(self, key: str, default: object = None) -> Sequence[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ANSWERS


def open_engine(run: Run) -> ScriptedEngine:
    run.source.loader.start()
    return ScriptedEngine(run.builder.tokenizer, _Alike())
