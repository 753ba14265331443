"""Questions without a ground truth: what a task asks with then, and what is read in an answer.

What is not known stands as such in the truth of the example: no interval, no letter, NaN for a box or a number. Such an
example can be asked and never scored. Called by commands/ask.py and commands/predict.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import choice_truth, read_duration_s, read_options, track_truth
from vcr1_fast.tasks.answer_format import clip, tag_blocks
from vcr1_fast.tasks.answers_batch import (
    Pick,
    read_box_lists,
    read_choices,
    read_glues,
    read_paper_choices,
    read_periods,
)
from vcr1_fast.tasks.benchmark_readers import read_timelens
from vcr1_fast.tasks.captioning import Captioning
from vcr1_fast.tasks.grounded_qa import GroundedQA
from vcr1_fast.tasks.multiple_choice import MultipleChoice, read_choice_row
from vcr1_fast.tasks.numeric_answer import NumericAnswer, benchmark_number
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.tasks.video_quality import VideoQuality
from vcr1_fast.types import (
    Box,
    CaptionTruth,
    ChoiceTruth,
    Example,
    GroundedChoiceTruth,
    IntervalTruth,
    LabelTruth,
    NumberTruth,
    TrackTruth,
    Truth,
)

NUM_BOXES = 8  # of a track where the row does not say when, as in VideoChat-R1
UNKNOWN_BOX: Box = (math.nan, math.nan, math.nan, math.nan)
Parsed = dict[str, Any]  # under the keys that an annotation row has


class PlainQuestion:
    """A question that goes to the model as it is. No form of answer is asked for, so nothing in it can be scored."""

    name = "plain"
    part_names: tuple[str, ...] = ()

    def __init__(self, config: TaskConfig) -> None:
        """No setting matters."""

    def parse_truth(self, row: Mapping[str, object]) -> LabelTruth:
        return LabelTruth("")

    def question(self, example: Example) -> str:
        return example.query

    def target(self, example: Example) -> str:
        return example.reasoning

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        return {}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        return {}

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        return {}


class _Unlabelled:
    """A task whose rows say no answer; all but `parse_truth` is the task's own."""

    def __init__(self, task: Task, recipe: str) -> None:
        self._task, self._recipe = task, recipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def parse_truth(self, row: Mapping[str, object]) -> Truth:
        return _truth(self._task, row, self._recipe)


def unlabelled(task: Task, config: TaskConfig) -> Task:
    """The task for rows without an answer: `parse_truth` takes what the question needs and nothing else.

    A choice needs "options", tracking the start "box" (or "boxes", of which the first counts), and "times_s" or
    "duration_s": without instants NUM_BOXES of them, evenly from 0 on. Custom tasks read their rows as they always do.
    `parse_truth` raises ValueError when what is needed is missing or malformed.
    """
    return cast("Task", _Unlabelled(task, config.recipe))


def _truth(task: Task, row: Mapping[str, object], recipe: str) -> Truth:
    is_paper = recipe == "paper"
    if task.name == ObjectTracking.name:
        return _track(task, row)
    if task.name in (MultipleChoice.name, GroundedQA.name):
        choice = read_choice_row({**row, "answer": "A"}, is_paper)  # every question has an option A
        if task.name == GroundedQA.name:
            return GroundedChoiceTruth("", choice.options, (), written=choice.written)
        return replace(choice, letter="")
    if task.name == VideoQuality.name:
        return LabelTruth("", read_options(row) if row.get("options") is not None else ())
    known: dict[str, Truth] = {
        TemporalGrounding.name: IntervalTruth(()),
        NumericAnswer.name: NumberTruth(math.nan),
        Captioning.name: CaptionTruth(()),
    }
    return known[task.name] if task.name in known else task.parse_truth(row)


def _track(task: Task, row: Mapping[str, object]) -> TrackTruth:
    box, boxes = row.get("box"), row.get("boxes")
    if box is None:
        box = boxes[0] if isinstance(boxes, list | tuple) and boxes else None
    if box is None:
        raise ValueError("box is missing, wanted the object's box at the start: x0, y0, x1, y1 as fractions")
    times_s = row.get("times_s")
    if times_s is None:
        duration_s = read_duration_s(row)
        if duration_s is None:
            raise ValueError("times_s and duration_s are missing, wanted the instants, or the seconds of the video")
        times_s = [duration_s * i / NUM_BOXES for i in range(NUM_BOXES)]
    count = len(times_s) if isinstance(times_s, list | tuple) else 1
    # The task checks box, instants and their number; of the boxes the first alone is known.
    truth = task.parse_truth({**row, "boxes": [box] * count, "times_s": times_s})
    assert isinstance(truth, TrackTruth)
    return replace(truth, boxes=(truth.boxes[0], *[UNKNOWN_BOX] * (count - 1)))


def read_answer(example: Example, text: str, config: TaskConfig) -> Parsed | None:
    """What an answer says, read as rewards of task.recipe read it; None where nothing can be read.

    Seconds in "intervals" (not cut to the video), corners in "boxes" with their "times_s", a letter, label or number in
    "answer", the text of the chosen one in "option". Other tasks: the text of the last answer block in "answer".
    """
    is_paper = config.recipe == "paper"
    pick: Pick = "first" if is_paper else "last"
    match example.truth:
        case IntervalTruth() if config.grounding_answer == "list":
            return _intervals(read_glues([text], config.recipe, "answer", pick)[0])
        case IntervalTruth():
            is_sentence = config.grounding_answer == "sentence"
            period = read_timelens(clip(text)) if is_sentence else read_periods([text], config.recipe)[0]
            return _intervals([period] if period and period[0] <= period[1] else None)
        case TrackTruth():
            return _boxes(example, read_box_lists([text], config.recipe, pick=pick)[0])
        case ChoiceTruth():
            options = choice_truth(example).options
            letter = read_paper_choices([text])[0] if is_paper else read_choices([text], [options])[0]
            said = _choice(letter, options)
            if isinstance(example.truth, GroundedChoiceTruth):
                said |= _intervals(read_glues([text], config.recipe, pick=pick)[0]) or {}
            return said or None
        case NumberTruth():
            number = benchmark_number(clip(text))
            return {"answer": number} if number is not None and math.isfinite(number) else None
        case _:
            blocks = tag_blocks(clip(text), "answer")
            return {"answer": blocks[-1].strip()} if blocks else None


def _intervals(intervals: Sequence[tuple[float, float]] | None) -> Parsed | None:
    return {"intervals": [list(interval) for interval in intervals]} if intervals else None


def _choice(letter: str | None, options: Sequence[str]) -> Parsed:
    index = ord(letter) - ord("A") if letter else len(options)
    return {"answer": letter, "option": options[index]} if index < len(options) else {}


def _boxes(example: Example, rows: Sequence[Sequence[float | None]] | None) -> Parsed | None:
    """None unless there is a box of four finite numbers for each instant."""
    times_s = track_truth(example).times_s
    if rows is None or len(rows) != len(times_s):
        return None
    if not all(corner is not None and math.isfinite(corner) for row in rows for corner in row):
        return None
    return {"boxes": [list(row) for row in rows], "times_s": list(times_s)}
