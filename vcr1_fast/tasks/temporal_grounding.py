"""Temporal grounding: when does an event happen? Answer "X to Y" in seconds.

Row: {"id", "task", "video", "query", "duration_s", "intervals": [[start_s, end_s], ...]}.

recipe fixed: broken ground truths are refused, predictions are clamped to the video, signs and units are read.
recipe paper: VideoChat-R1 (arXiv 2504.06958, grpo_tg.py) with its parser, its hull IoU and its reversed ground truths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import (
    check_counts,
    checked_interval,
    frac_at_least,
    interval_truth,
    mean,
    read_duration_s,
    read_rows,
)
from vcr1_fast.tasks.answers_batch import Rule, have_format, read_periods
from vcr1_fast.tasks.constant_interval import best_constant_interval
from vcr1_fast.tasks.overlap import interval_iou_batch
from vcr1_fast.tasks.prompt_file import Wording, one_line
from vcr1_fast.tasks.shaping import boundary_factor
from vcr1_fast.types import Example, Interval, IntervalTruth

QUESTIONS = {
    "fixed": "When exactly does this happen in the video: {event_plain}? {reason} start and end in seconds with two "
    "decimals as <answer>X to Y</answer>.",
    "paper": 'Find the precise period of the event "{event}" in the video. {reason}Write its start and end in seconds '
    "with two decimals as X to Y inside <answer></answer>, for example <answer>12.54 to 17.83</answer>.",
}
PLACEHOLDERS = ("event", "event_plain")
REQUIRED = ((*PLACEHOLDERS, "query", "query_line"),)


class TemporalGrounding:
    """Reward parts: format, and iou of the predicted period with the true ones."""

    name = "temporal_grounding"
    part_names: tuple[str, ...] = ("format", "iou")
    questions: Mapping[str, str] = QUESTIONS  # by recipe

    def __init__(self, config: TaskConfig) -> None:
        self.rule: Rule = config.recipe
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.is_boundary = config.iou == "boundary"
        self.wording = Wording(config, self.name, self.questions, PLACEHOLDERS, REQUIRED)

    def parse_truth(self, row: Mapping[str, object]) -> IntervalTruth:
        """Intervals in seconds. fixed: 0 <= start < end <= duration_s, later ends cut off. paper: as they are.

        Raises ValueError for missing, malformed or non-finite numbers, and in recipe fixed for an interval that is
        reversed, empty, or starts outside the video.
        """
        intervals = [(start_s, end_s) for start_s, end_s in read_rows(row, "intervals", "interval", 2)]
        duration_s = read_duration_s(row)
        if self.is_paper:
            return IntervalTruth(tuple(intervals))
        return IntervalTruth(tuple(checked_interval(i, interval, duration_s) for i, interval in enumerate(intervals)))

    def question(self, example: Example) -> str:
        """The user's text; the video itself is not part of it."""
        return self.wording.ask(example, self.question_fields(example))

    def question_fields(self, example: Example) -> dict[str, str]:
        """event: the query as annotated; paper: in training as grpo_tg.py has it, without blanks around it, in lower
        case, without the last "." (evaluate_grounding.py has it as annotated). event_plain: in one line, without ".".
        """
        event = example.query
        if self.is_paper and not example.is_held_out:
            event = event.strip().lower().removesuffix(".")
        return {"event": event, "event_plain": one_line(example.query).removesuffix(".")}

    def target(self, example: Example) -> str:
        """The completion to learn from: the longest true interval, two decimals, after the example's reasoning."""
        start_s, end_s = max(interval_truth(example).intervals_s, key=lambda interval: interval[1] - interval[0])
        return self._answer(start_s, end_s, example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" and "iou" of N answers, each in [0, 1].

        format, fixed: one think block (if asked for), one answer block, and a period that can be read in it.
        format, paper: the tags alone. iou is 0 where no period can be read or it is reversed; task.iou boundary: times
        `boundary_factor`.
        """
        check_counts(len(examples), len(answers))
        periods = read_periods(answers, self.rule)
        is_formatted = have_format(answers, self.rule, self.think)
        if not self.is_paper:
            is_formatted = [ok and period is not None for ok, period in zip(is_formatted, periods, strict=True)]
        predicted = [self._scored(period, ex) for period, ex in zip(periods, examples, strict=True)]
        iou = self._iou(predicted, examples)
        if self.is_boundary:
            iou = [
                value * boundary_factor(intervals[0], interval_truth(ex).intervals_s, ex.duration_s)
                if intervals
                else 0.0
                for value, intervals, ex in zip(iou, predicted, examples, strict=True)
            ]
        return {"format": [float(ok) for ok in is_formatted], "iou": iou}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Mean IoU and the share of answers whose IoU reaches 0.3, 0.5, 0.7. Unreadable answers count as IoU 0.

        In [0, 1]; read as the reward reads them, never with the boundary factor. Raises ValueError without examples.
        """
        check_counts(len(examples), len(answers))
        periods = read_periods(answers, self.rule)
        predicted = [self._scored(period, ex) for period, ex in zip(periods, examples, strict=True)]
        iou = self._iou(predicted, examples)
        recalls = {f"r@{threshold}": frac_at_least(iou, threshold) for threshold in (0.3, 0.5, 0.7)}
        return {"miou": mean(iou), **recalls}

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """whole_video: 0 to the duration. best_constant: the part of the video that scores best on these examples.

        The second one looks at the truths: it is the floor that a model which never watched the video could reach.
        """
        start_frac, end_frac = self.best_constant(examples)
        return {
            "whole_video": [self._answer(0.0, ex.duration_s) for ex in examples],
            "best_constant": [self._answer(start_frac * ex.duration_s, end_frac * ex.duration_s) for ex in examples],
        }

    def best_constant(self, examples: Sequence[Example]) -> Interval:
        """(start, end) as fractions of the duration: of all on a grid the one with the highest mean IoU."""
        truths = [interval_truth(ex).intervals_s for ex in examples]
        return best_constant_interval(truths, [ex.duration_s for ex in examples], "hull" if self.is_paper else "set")

    def _answer(self, start_s: float, end_s: float, reasoning: str = "") -> str:
        think = f"<think>{reasoning}</think>" if self.think else ""
        return f"{think}<answer>{start_s:.2f} to {end_s:.2f}</answer>"

    def _scored(self, period: Interval | None, example: Example) -> list[Interval]:
        """What enters the IoU: nothing for an unreadable or reversed period; fixed: clamped to the video."""
        if period is None or period[0] > period[1]:
            return []
        if self.is_paper:
            return [period]
        return [(_clamp(period[0], example.duration_s), _clamp(period[1], example.duration_s))]

    def _iou(self, predicted: list[list[Interval]], examples: Sequence[Example]) -> list[float]:
        truths = [interval_truth(ex).intervals_s for ex in examples]
        return interval_iou_batch(predicted, truths, "hull" if self.is_paper else "set")


def _clamp(time_s: float, duration_s: float) -> float:
    return min(max(time_s, 0.0), duration_s)
