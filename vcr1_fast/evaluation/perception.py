"""Iterative perception at test time (VideoChat-R1.5, arXiv 2509.21100): find what matters, look closer, ask again.

    round 1 .. K-1   the question as grounded QA; the next round looks closer at the seconds that the answer names
    round K          the plain question; its letter is the answer

focus, as its code does it (Videochat-R1.5/src_eval of OpenGVLab/VideoChat-R1: eval_*.py, my_vision_process.py): the
clip is never cut. Every round shows all of it by the same budgets, and from the second one on its frames lie 1.5 times
as close together in the evidence named last (`video.sampling.focus_indices`). The model is told the rate that equally
spaced frames would have, and the video stands before the question (task.video_first). Its budgets: 128 x 108 x 28^2
pixels in all, 128 to 768 x 28^2 a frame, 2 frames a second, 4 to 512 of them (eval.video). There, folders of images
stay equally spaced, and the last round asks for no thinking; here a folder is a video like any other, and task.think
holds in all rounds.

crop: the evidence is cut out with a margin and shown on its own, from second 0, at twice the frame rate of the round
before and with the whole pixel budget, so both finer in time and larger.

For questions with options about one video alone; others are asked once.
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
from vcr1_fast.video.source_name import focus_name, part_name

TASKS = ("multiple_choice", "grounded_qa")
MARGIN_FRAC = 0.1  # of the cut's length, on either side: predicted borders are about that inexact
MIN_CUT_S = 4.0
DENSER = 2.0  # frame rate of a cut, from one round to the next


@dataclass(frozen=True)
class Focus:
    """What is known about one example between rounds."""

    example: Example
    is_cut: bool = False  # crop
    start_s: float = 0.0  # of what was shown last, in the whole video
    end_s: float = math.inf
    intervals_s: tuple[Interval, ...] = ()  # the evidence named last, in the whole video

    def narrowed(self, answer: Answer) -> Focus:
        """After an answer, whose seconds count from the start of what it was shown. One that names none changes
        nothing."""
        blocks = tag_blocks(clip_text(answer.text), "glue")
        named = read_glue(blocks[-1]) if blocks else None
        shown_s = min(self.end_s, self.example.duration_s) - self.start_s
        named = inside_video(named, shown_s) if named else []
        if not named:
            return self
        found = replace(self, intervals_s=tuple((start + self.start_s, end + self.start_s) for start, end in named))
        return found._cut() if self.is_cut else found

    def _cut(self) -> Focus:
        start_s, end_s = min(start for start, _ in self.intervals_s), max(end for _, end in self.intervals_s)
        margin_s = max(MARGIN_FRAC * (end_s - start_s), (MIN_CUT_S - (end_s - start_s)) / 2)
        return replace(self, start_s=max(0.0, start_s - margin_s), end_s=min(self.example.duration_s, end_s + margin_s))

    def asked(self, task: str, fps: float) -> Example:
        """The example of the next round; `fps`: of what is cut out. The video itself where no evidence is known."""
        example = replace(self.example, task=task)
        if not self.intervals_s:
            return example
        if not self.is_cut:
            return replace(example, video=focus_name(example.video, self.intervals_s))
        name = part_name(example.video, self.start_s, self.end_s, fps)
        return replace(example, video=name, duration_s=self.end_s - self.start_s)

    def answered(self, answer: Answer) -> Answer:
        """The last answer, for grounded QA with the evidence found on the way."""
        if self.example.task != "grounded_qa" or answer.failure or not self.intervals_s:
            return answer
        return replace(answer, text=f"{answer.text}<glue>{glue_text(self.intervals_s)}</glue>")


def has_rounds(example: Example) -> bool:
    """Whether it is asked more than once."""
    return example.task in TASKS and example.sources == (example.video,)


def round_examples(focuses: Sequence[Focus], number: int, num_rounds: int, config: VideoConfig) -> list[Example]:
    """What round `number` (1 .. num_rounds) asks, one for one."""
    task = "multiple_choice" if number == num_rounds else "grounded_qa"
    fps = config.fps * DENSER ** (number - 1)
    return [focus.asked(task, fps) for focus in focuses]
