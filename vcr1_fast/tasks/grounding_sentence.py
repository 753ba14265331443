"""Temporal grounding answered by a sentence, as TimeLens is trained (task.grounding_answer: sentence).

    The event happens in 12.5 - 17.0 seconds.

No think block and no tags (TencentARC/TimeLens, training/data/grounding.py; arXiv 2512.14698). Its reward is the
overlap alone: task.reward_weights.format is 0. Rewards and scores read an answer by `benchmark_readers.read_timelens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vcr1_fast.tasks.answer_format import clip
from vcr1_fast.tasks.benchmark_readers import read_timelens
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.types import Interval

_TIME = r"[0-9]++(?:\.[0-9]++)?+"
_SENTENCE = re.compile(rf"The event happens in {_TIME} - {_TIME} seconds\.?", re.ASCII)


class GroundingBySentence(TemporalGrounding):
    """Reward parts: format, the sentence and nothing else, and iou of the first period in the answer."""

    questions: ClassVar[Mapping[str, str]] = {
        "fixed": "In which part of the video does this happen: {event_plain}? Give its start and end in seconds, in "
        "this form: The event happens in <start> - <end> seconds.",
    }

    def read_periods(self, answers: Sequence[str]) -> list[Interval | None]:
        return [self.read_score(answer) for answer in answers]

    def have_format(self, answers: Sequence[str], periods: Sequence[Interval | None]) -> list[bool]:
        return [_SENTENCE.fullmatch(clip(answer).strip()) is not None for answer in answers]

    def read_score(self, answer: str) -> Interval | None:
        return read_timelens(clip(answer))

    def _answer(self, start_s: float, end_s: float, reasoning: str = "") -> str:
        return f"The event happens in {start_s:.1f} - {end_s:.1f} seconds."
