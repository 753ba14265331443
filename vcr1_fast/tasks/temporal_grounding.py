"""Temporal grounding: when does an event happen? Answer "X to Y" in seconds.

Row: {"id", "task", "video", "query", "duration_s", "intervals": [[start_s, end_s], ...]}.

recipe fixed: broken ground truths are refused; rewards read signs and units.
recipe paper: VideoChat-R1 (arXiv 2504.06958, grpo_tg.py) with its parser, its hull IoU and its reversed ground truths.
Held-out scores read answers as the benchmarks' script does (`benchmark_readers.read_period`), in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import (
    check_counts,
    checked_interval,
    frac_at_least,
    interval_truth,
    mean,
    read_duration_s,
    read_rows,
    without_overshoot,
)
from vcr1_fast.tasks.answers_batch import Rule, have_format, read_periods
from vcr1_fast.tasks.benchmark_readers import read_period
from vcr1_fast.tasks.constant_interval import best_constant_interval
from vcr1_fast.tasks.overlap import interval_iou_batch
from vcr1_fast.tasks.prompt_file import Worded, Wording, one_line
from vcr1_fast.tasks.shaping import boundary_factor
from vcr1_fast.types import Example, Interval, IntervalTruth

PLACEHOLDERS = ("event", "event_plain")
REQUIRED = ((*PLACEHOLDERS, "query", "query_line"),)


class TemporalGrounding(Worded):
    """Reward parts: format, and iou of the predicted period with the true ones."""

    name = "temporal_grounding"
    needs_video = True
    part_names: tuple[str, ...] = ("format", "iou")
    questions: ClassVar[Mapping[str, str]] = {
        "fixed": "When exactly does this happen in the video: {event_plain}? {reason} start and end in seconds with "
        "two decimals as <answer>X to Y</answer>.",
        "paper": 'Find the precise period of the event "{event}" in the video. {reason}Write its start and end in '
        "seconds with two decimals as X to Y inside <answer></answer>, for example <answer>12.54 to 17.83</answer>.",
    }

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
        periods = self.read_periods(answers)
        is_formatted = self.have_format(answers, periods)
        predicted = [self._scored(period, ex) for period, ex in zip(periods, examples, strict=True)]
        iou = interval_iou_batch(predicted, true_intervals(examples), "hull" if self.is_paper else "set")
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

        In [0, 1]. As in the benchmarks: periods are not cut to the video, there is no boundary factor, and of several
        true intervals the one that fits best counts, as in QVHighlights (moment_detr, compute_mr_r1). Raises ValueError
        without examples.
        """
        check_counts(len(examples), len(answers))
        iou = _best_iou([self.read_score(answer) for answer in answers], examples)
        recalls = {f"r@{threshold}": frac_at_least(iou, threshold) for threshold in (0.3, 0.5, 0.7)}
        return {"miou": mean(iou), **recalls}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        return [self.read_score(answer) is not None for answer in answers]

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
        return best_constant_interval(true_intervals(examples), [ex.duration_s for ex in examples])

    def read_periods(self, answers: Sequence[str]) -> list[Interval | None]:
        """What the reward reads."""
        return read_periods(answers, self.rule)

    def have_format(self, answers: Sequence[str], periods: Sequence[Interval | None]) -> list[bool]:
        """Part `format`; `periods`: what was read in the answers."""
        is_formatted = have_format(answers, self.rule, self.think)
        return [ok and (self.is_paper or period is not None) for ok, period in zip(is_formatted, periods, strict=True)]

    def read_score(self, answer: str) -> Interval | None:
        """What the held-out score reads."""
        return read_period(answer)

    def _answer(self, start_s: float, end_s: float, reasoning: str = "") -> str:
        return self.completion(f"{start_s:.2f} to {end_s:.2f}", reasoning)

    def _scored(self, period: Interval | None, example: Example) -> list[Interval]:
        """What enters the reward's IoU: nothing for an unreadable or reversed period; fixed: `without_overshoot`."""
        if period is None or period[0] > period[1]:
            return []
        return [period if self.is_paper else without_overshoot(period, example.duration_s)]


def _best_iou(periods: Sequence[Interval | None], examples: Sequence[Example]) -> list[float]:
    """IoU of each period with the true interval that fits it best; 0 without a period."""
    truths = true_intervals(examples)
    pairs = [(period, one) for period, truth in zip(periods, truths, strict=True) for one in truth]
    values = iter(interval_iou_batch([[said] if said else [] for said, _ in pairs], [[one] for _, one in pairs], "set"))
    return [max(next(values) for _ in truth) for truth in truths]


def true_intervals(examples: Sequence[Example]) -> list[tuple[Interval, ...]]:
    """The truths of temporal examples."""
    return [interval_truth(ex).intervals_s for ex in examples]
