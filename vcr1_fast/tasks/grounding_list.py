"""Temporal grounding answered by all periods of an event, as VideoChat-R1.5 is trained (task.grounding_answer: list).

Its rule (Videochat-R1.5/src/open_r1/prompts.py and reward_funcs.py of OpenGVLab/VideoChat-R1): an answer block with
"[(s1, e1), (s2, e2), ...]", no think block, at most 3 periods (task.think, task.max_intervals), and as iou that of both
lists as sets of instants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import check_counts, frac_at_least, interval_truth, mean, without_overshoot
from vcr1_fast.tasks.answer_format import clip, tag_blocks
from vcr1_fast.tasks.answers_batch import have_format, read_glues
from vcr1_fast.tasks.glue_format import glue_text, read_glue
from vcr1_fast.tasks.grounded_qa import limited, longest
from vcr1_fast.tasks.overlap import interval_iou_batch
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding, true_intervals
from vcr1_fast.types import Example, Interval


class GroundingByList(TemporalGrounding):
    """Reward parts: format, and iou of the listed periods with the true ones."""

    questions: ClassVar[Mapping[str, str]] = {
        "fixed": "When exactly does this happen in the video: {event_plain}? {reason} start and end of each time in "
        "seconds with two decimals as <answer>[(start, end), ...]</answer>.",
        "paper": 'Find the precise periods of the event "{event}" in the video. {reason}Write their starts and ends in '
        "seconds with two decimals as [(s1, e1), (s2, e2), ...] inside <answer></answer>, for example "
        "<answer>[(12.54, 17.83)]</answer>.",
    }

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.max_intervals = config.max_intervals

    def target(self, example: Example) -> str:
        """The completion to learn from: the true intervals, see `longest`, after the example's reasoning."""
        listed = longest(interval_truth(example).intervals_s, self.max_intervals)
        return self.completion(glue_text(listed), example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" and "iou" of N answers, each in [0, 1].

        format, fixed: one think block (if asked for), one answer block, and a list that can be read in it. format,
        paper: the tags alone. iou is 0 where no list can be read or it is longer than task.max_intervals; fixed: of
        periods as `without_overshoot` leaves them.
        """
        check_counts(len(examples), len(answers))
        lists = read_glues(answers, self.rule, "answer", "first" if self.is_paper else "last")
        lists = limited(lists, self.max_intervals)
        is_formatted = have_format(answers, self.rule, self.think)
        if not self.is_paper:
            is_formatted = [ok and listed is not None for ok, listed in zip(is_formatted, lists, strict=True)]
            lists = [
                listed and [without_overshoot(period, ex.duration_s) for period in listed]
                for listed, ex in zip(lists, examples, strict=True)
            ]
        iou = interval_iou_batch([listed or [] for listed in lists], true_intervals(examples), "set")
        return {"format": [float(ok) for ok in is_formatted], "iou": iou}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Mean set IoU and the share of answers whose IoU reaches 0.3, 0.5, 0.7. Unreadable answers count as IoU 0.

        Read as by src_eval/evaluate_chara.py there: the first answer block, else all of the output, as a list of any
        length, not cut to the video. Raises ValueError without examples.
        """
        check_counts(len(examples), len(answers))
        iou = interval_iou_batch([_said(answer) or [] for answer in answers], true_intervals(examples), "set")
        recalls = {f"r@{threshold}": frac_at_least(iou, threshold) for threshold in (0.3, 0.5, 0.7)}
        return {"miou": mean(iou), **recalls}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        return [_said(answer) is not None for answer in answers]

    def _answer(self, start_s: float, end_s: float, reasoning: str = "") -> str:
        return self.completion(glue_text([(start_s, end_s)]), reasoning)


def _said(answer: str) -> list[Interval] | None:
    text = clip(answer)
    blocks = tag_blocks(text, "answer")
    return read_glue(blocks[0] if blocks else text)
