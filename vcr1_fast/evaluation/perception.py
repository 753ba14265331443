"""Iterative perception at test time (VideoChat-R1.5, arXiv 2509.21100): find what matters, look closer, ask again.

    round 1 .. K-1   the question as grounded QA; the seconds that the answer names are the clip of the next round
    round K          the plain question about the last clip; its letter is the answer

A clip is shown on its own, from second 0, at twice the frame rate of the round before and with the whole pixel budget,
so both finer in time and larger. (The original also keeps coarse frames of the rest; its text was never released in
full, so this is its idea and not its recipe.) For questions with options; other tasks are asked once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vcr1_fast.evaluation.samples import Answer
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.tasks.answer_format import clip as clip_text
from vcr1_fast.tasks.answer_format import tag_blocks
from vcr1_fast.tasks.glue_format import glue_text, read_glue
from vcr1_fast.tasks.grounded_qa import inside_video
from vcr1_fast.types import Example, Interval
from vcr1_fast.video.clip import part_name

TASKS = ("multiple_choice", "grounded_qa")
MARGIN_FRAC = 0.1  # of the clip's length, on either side: predicted borders are about that inexact
MIN_CLIP_S = 4.0
DENSER = 2.0  # frame rate from one round to the next


@dataclass(frozen=True)
class Focus:
    """What is known about one example between rounds."""

    example: Example
    start_s: float = 0.0  # of the clip shown last, in the whole video
    end_s: float = math.inf
    intervals_s: tuple[Interval, ...] = ()  # the evidence named last, in the whole video

    def narrowed(self, answer: Answer) -> Focus:
        """After an answer about the clip, whose seconds count from its start. One that names none changes nothing."""
        blocks = tag_blocks(clip_text(answer.text), "glue")
        named = read_glue(blocks[-1]) if blocks else None
        shown_s = min(self.end_s, self.example.duration_s) - self.start_s
        named = inside_video(named, shown_s) if named else []
        if not named:
            return self
        found = tuple((start + self.start_s, end + self.start_s) for start, end in named)
        start_s, end_s = min(start for start, _ in found), max(end for _, end in found)
        margin_s = max(MARGIN_FRAC * (end_s - start_s), (MIN_CLIP_S - (end_s - start_s)) / 2)
        return replace(
            self,
            start_s=max(0.0, start_s - margin_s),
            end_s=min(self.example.duration_s, end_s + margin_s),
            intervals_s=found,
        )

    def asked(self, task: str, fps: float) -> Example:
        """The example of the next round: the clip in place of the video, unless that is still the whole."""
        if self.start_s == 0.0 and self.end_s == math.inf:
            return replace(self.example, task=task)
        name = part_name(self.example.video, self.start_s, self.end_s, fps)
        return replace(self.example, task=task, video=name, duration_s=self.end_s - self.start_s)

    def answered(self, answer: Answer) -> Answer:
        """The last answer, for grounded QA with the evidence found on the way."""
        if self.example.task != "grounded_qa" or answer.failure or not self.intervals_s:
            return answer
        return replace(answer, text=f"{answer.text}<glue>{glue_text(self.intervals_s)}</glue>")


def first_round(examples: Sequence[Example]) -> list[Focus]:
    """The whole video of each example."""
    return [Focus(example) for example in examples]


def round_examples(focuses: Sequence[Focus], number: int, num_rounds: int, config: VideoConfig) -> list[Example]:
    """What round `number` (1 .. num_rounds) asks, one for one."""
    task = "multiple_choice" if number == num_rounds else "grounded_qa"
    fps = config.fps * DENSER ** (number - 1)
    return [focus.asked(task, fps) for focus in focuses]
