"""Grounded question answering: which answer is right, and when does the video show it? Answer: letter and intervals.

Row: {"id", "task", "video", "query", "duration_s", "options": ["a cat", ...], "answer": "C",
"intervals": [[start_s, end_s], ...]}, and optionally "scoring", as in multiple_choice.

Rewards, recipe fixed: the letter is read with care, intervals in any common notation; broken ground truths are refused.
recipe paper: VideoChat-R1 (arXiv 2504.06958, grpo_gqa.py) on NExT-GQA, with its parsers.
Held-out scores read answers as its evaluation does (`benchmark_readers`), in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import (
    check_counts,
    checked_interval,
    frac_at_least,
    grounded_choice_truth,
    mean,
    read_duration_s,
    read_intervals,
    without_overshoot,
)
from vcr1_fast.tasks.answer_format import clip
from vcr1_fast.tasks.answers_batch import have_format, read_glues
from vcr1_fast.tasks.benchmark_readers import read_evidence
from vcr1_fast.tasks.choice_format import most_common
from vcr1_fast.tasks.constant_interval import best_constant_interval
from vcr1_fast.tasks.glue_format import glue_text, has_paper_glue_format
from vcr1_fast.tasks.multiple_choice import (
    ASKED,
    PLACEHOLDERS,
    REQUIRED,
    accuracy,
    choice_fields,
    read_choice_row,
    read_letters,
    said_letters,
)
from vcr1_fast.tasks.overlap import connected_pieces, interval_iou_batch
from vcr1_fast.tasks.prompt_file import Worded, Wording
from vcr1_fast.types import Example, GroundedChoiceTruth, Interval

QUESTIONS = {
    "fixed": ASKED["fixed"] + " {reason} the letter and the seconds that show it as "
    "<answer>A</answer><glue>[(start, end), ...]</glue>.",
    "paper": ASKED["paper"] + " {reason}Write the letter of the option inside <answer></answer>, and inside "
    "<glue></glue> the periods of the video, in seconds, that your answer rests on, as [(s1, e1), (s2, e2), ...]; for "
    "example <answer>A</answer><glue>[(5.2, 10.4)]</glue>.",
}


class GroundedQA(Worded):
    """Reward parts: format, iou of the intervals with the true ones as sets, and accuracy: 1 for the right letter."""

    name = "grounded_qa"
    needs_video = True
    part_names: tuple[str, ...] = ("format", "iou", "accuracy")

    def __init__(self, config: TaskConfig) -> None:
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.wording = Wording(config, self.name, QUESTIONS, PLACEHOLDERS, REQUIRED)
        self.max_intervals = config.max_intervals

    def parse_truth(self, row: Mapping[str, object]) -> GroundedChoiceTruth:
        """Letter, options and intervals in seconds. fixed: cut to the video, 0 <= start < end <= duration_s.

        (NExT-GQA's test split has 36 intervals that start at -0.1 or -0.2 s; none in either split is reversed.)
        Raises ValueError for missing or malformed fields, for a letter beyond the options and for a reversed interval;
        fixed: also for an interval that is empty or lies outside the video.
        """
        choice = read_choice_row(row, self.is_paper, "videochat_r1")
        duration_s = read_duration_s(row)
        intervals = [self._checked(i, interval, duration_s) for i, interval in enumerate(read_intervals(row))]
        return GroundedChoiceTruth(
            choice.letter, choice.options, tuple(intervals), written=choice.written, scoring=choice.scoring
        )

    def question_fields(self, example: Example) -> dict[str, str]:
        """See `multiple_choice.choice_fields`."""
        return choice_fields(example)

    def target(self, example: Example) -> str:
        """The completion to learn from: letter and true intervals, two decimals, after the example's reasoning."""
        truth = grounded_choice_truth(example)
        shown = longest(truth.intervals_s, self.max_intervals)
        # the paper's parser knows no minus sign; the truths of NExT-GQA have some, "-0.0" among them
        intervals = [(max(0.0, start_s), end_s) for start_s, end_s in shown]
        return self._answer(truth.letter, intervals, example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format", "iou" and "accuracy" of N answers, each in [0, 1].

        format, fixed: one think block (if asked for), one answer block with a letter, one glue block with at least one
        interval. format, paper: the tags, which may repeat, and a valid glue list, which may be empty. iou is 0 where
        the list cannot be read; paper: 1 where neither it nor the truth has any length. A list of more intervals than
        task.max_intervals counts as one that cannot be read.
        """
        letters, glues = self._read_all(examples, answers)
        glues = limited(glues, self.max_intervals)
        if self.is_paper:
            is_formatted = [
                has_paper_glue_format(clip(answer), self.think) and glue is not None
                for answer, glue in zip(answers, glues, strict=True)
            ]
        else:
            have_tags = have_format(answers, "fixed", self.think, ("answer", "glue"))
            is_formatted = [
                has_tags and letter is not None and glue is not None
                for has_tags, letter, glue in zip(have_tags, letters, glues, strict=True)
            ]
        return {
            "format": [float(ok) for ok in is_formatted],
            "iou": _iou(glues, examples, is_empty_right=self.is_paper),
            "accuracy": accuracy(letters, examples),
        }

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """The benchmark's metrics and those that VideoChat-R1 prints, in [0, 1]; unreadable answers count as 0.

        acc: right letters. miou: mean set IoU of the intervals, VideoChat-R1's mIoU. Intervals are not cut to the
        video. The others are NExT-GQA's (arXiv 2309.01327, its eval_ground.py), see `segment_overlap`: mean IoU
        (nextgqa_miou) and IoP (miop) with the best true segment, the shares of answers in which they reach 0.3 and 0.5,
        and acc@gqa: right letter and IoP >= 0.5. The benchmark's script leaves unanswered questions out, this does not.
        The recipe's headline comes first. Raises ValueError when there are no examples.
        """
        is_right = accuracy(said_letters(examples, answers), examples)
        glues = [read_evidence(answer) for answer in answers]
        iou, iop = segment_overlap([glue or [] for glue in glues], [_intervals_s(ex) for ex in examples])
        grounded = [right if part >= 0.5 else 0.0 for right, part in zip(is_right, iop, strict=True)]
        values = {
            "acc@gqa": mean(grounded),
            "acc": mean(is_right),
            "miou": mean(_iou(glues, examples, is_empty_right=True)),
            "miop": mean(iop),
            "iop@0.3": frac_at_least(iop, 0.3),
            "iop@0.5": frac_at_least(iop, 0.5),
            "nextgqa_miou": mean(iou),
            "iou@0.3": frac_at_least(iou, 0.3),
            "iou@0.5": frac_at_least(iou, 0.5),
        }
        headline = "miou" if self.is_paper else "acc@gqa"
        return {headline: values.pop(headline), **values}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Whether both letter and intervals can be read."""
        letters = said_letters(examples, answers)
        return [
            letter is not None and read_evidence(answer) is not None
            for letter, answer in zip(letters, answers, strict=True)
        ]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """The majority letter, with the whole video or with the best constant part of it as evidence.

        Both letter and part (see `best_constant_interval`) are chosen by looking at the truths of these examples.
        """
        letter = most_common(grounded_choice_truth(ex).letter for ex in examples)
        durations_s = [ex.duration_s for ex in examples]
        start_frac, end_frac = best_constant_interval([_intervals_s(ex) for ex in examples], durations_s)
        return {
            "whole_video": [self._answer(letter, [(0.0, duration_s)]) for duration_s in durations_s],
            "best_constant": [
                self._answer(letter, [(start_frac * duration_s, end_frac * duration_s)]) for duration_s in durations_s
            ],
        }

    def _checked(self, index: int, interval: Interval, duration_s: float | None) -> Interval:
        start_s, end_s = interval
        if self.is_paper and start_s <= end_s:
            return interval
        if end_s > 0.0:
            start_s = max(0.0, start_s)
        return checked_interval(index, (start_s, end_s), duration_s)

    def _answer(self, letter: str, intervals: Sequence[Interval], reasoning: str = "") -> str:
        return f"{self.completion(letter, reasoning)}<glue>{glue_text(intervals)}</glue>"

    def _read_all(
        self, examples: Sequence[Example], answers: Sequence[str]
    ) -> tuple[list[str | None], list[list[Interval] | None]]:
        """Letter and intervals of every answer, None where they cannot be read."""
        check_counts(len(examples), len(answers))
        letters = read_letters(examples, answers, self.is_paper)
        if self.is_paper:  # the first glue block; fixed: the last one
            return letters, read_glues(answers, "paper", pick="first")
        return letters, [
            intervals and [without_overshoot(interval, ex.duration_s) for interval in intervals]
            for intervals, ex in zip(read_glues(answers, "fixed"), examples, strict=True)
        ]


def limited(glues: Sequence[list[Interval] | None], most: int | None) -> list[list[Interval] | None]:
    """The lists, None in place of those that are longer than `most`."""
    return [None if glue is not None and most is not None and len(glue) > most else glue for glue in glues]


def longest(intervals: Sequence[Interval], most: int | None) -> list[Interval]:
    """All intervals, or the `most` longest where there are more, in order of time then."""
    if most is None or len(intervals) <= most:
        return list(intervals)
    return sorted(sorted(intervals, key=lambda interval: interval[0] - interval[1])[:most])


def inside_video(intervals: Sequence[Interval], duration_s: float) -> list[Interval]:
    """The parts of the intervals that lie in [0, duration_s]; those that lie outside of it go."""
    return [
        (max(0.0, start_s), min(end_s, duration_s))
        for start_s, end_s in intervals
        if max(0.0, start_s) < min(end_s, duration_s) or 0.0 <= start_s == end_s <= duration_s
    ]


def segment_overlap(
    predicted: Sequence[Sequence[Interval]], truth: Sequence[Sequence[Interval]]
) -> tuple[list[float], list[float]]:
    """IoU and IoP of N predictions, each with the true segment where it is highest, as NExT-GQA counts them.

    NExT-GQA (arXiv 2309.01327, eval_ground.py) compares one predicted span with every true segment on its own and takes
    the two maxima separately. A prediction of several intervals, which it does not know, enters here as one set, so
    that junk beside a good interval costs; one interval gives the script's own numbers.
    """
    lengths = [len(segments) for segments in truth]
    pairs = [(intervals, [s]) for intervals, segments in zip(predicted, truth, strict=True) for s in segments]
    flat_iou = interval_iou_batch([p for p, _ in pairs], [t for _, t in pairs], "set")
    flat_iop = interval_iou_batch([p for p, _ in pairs], [t for _, t in pairs], "iop")
    iou, iop, first = [], [], 0
    for length in lengths:
        iou.append(max(flat_iou[first : first + length], default=0.0))
        iop.append(max(flat_iop[first : first + length], default=0.0))
        first += length
    return iou, iop


def _iou(glues: Sequence[list[Interval] | None], examples: Sequence[Example], *, is_empty_right: bool) -> list[float]:
    """Set IoU of each answer. `is_empty_right`: 1 where neither list nor truth has any length, as in the paper."""
    truths = [_intervals_s(ex) for ex in examples]
    iou = interval_iou_batch([glue or [] for glue in glues], truths, "set")
    if not is_empty_right:
        return iou
    return [
        1.0 if glue is not None and not connected_pieces([*glue, *truth]) else value
        for value, glue, truth in zip(iou, glues, truths, strict=True)
    ]


def _intervals_s(example: Example) -> tuple[Interval, ...]:
    return grounded_choice_truth(example).intervals_s
