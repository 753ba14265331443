"""Checks on the fields of an annotation row. Called by the tasks; raises ValueError with one reason."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import TypeVar

from vcr1_fast.tasks.choice_format import marked_options
from vcr1_fast.types import (
    CaptionTruth,
    ChoiceTruth,
    Example,
    GroundedChoiceTruth,
    Interval,
    IntervalTruth,
    LabelTruth,
    NumberTruth,
    TrackTruth,
)

TruthKind = TypeVar("TruthKind")


def read_number(value: object, name: str) -> float:
    """A finite number; true and false are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r:.60}, wanted a number")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, wanted a finite number")
    return number


def read_numbers(value: object, name: str, count: int | None = None) -> tuple[float, ...]:
    """A list of finite numbers, of a given length if one is given."""
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        wanted = "a list of numbers" if count is None else f"a list of {count} numbers"
        raise ValueError(f"{name} is {value!r:.60}, wanted {wanted}")
    return tuple(read_number(item, f"{name}[{i}]") for i, item in enumerate(value))


def read_rows(row: Mapping[str, object], key: str, item: str, width: int) -> list[tuple[float, ...]]:
    """The non-empty list of `width`-number lists under `key`; `item` names one of them in messages."""
    value = row.get(key)
    if not isinstance(value, (list, tuple)) or not value:
        got = f"{value!r:.60}" if key in row else "missing"
        raise ValueError(f"{key} is {got}, wanted a list of lists of {width} numbers, at least one")
    return [read_numbers(entry, f"{item} {i}", width) for i, entry in enumerate(value)]


def read_duration_s(row: Mapping[str, object]) -> float | None:
    """duration_s of the row, seconds > 0; None when the row does not say."""
    if row.get("duration_s") is None:
        return None
    duration_s = read_number(row["duration_s"], "duration_s")
    if duration_s <= 0:
        raise ValueError(f"duration_s is {duration_s}, wanted more than 0 seconds")
    return duration_s


def read_text(row: Mapping[str, object], key: str) -> str:
    """The text under `key`, without blanks around it; not empty."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        got = f"{value!r:.60}" if key in row else "missing"
        raise ValueError(f"{key} is {got}, wanted text that is not empty")
    return value.strip()


_LETTER_MARK = re.compile(r"\(?([A-Z])[).:]\s*+")  # "(A) ", "A. ", "A) ", "A: "


def read_options(row: Mapping[str, object]) -> tuple[str, ...]:
    """The 2 to 26 answers to choose from, under "options".

    Letters in front of them ("(A) a cat", "B. a dog") are taken off when every option carries its own.
    """
    value = row.get("options")
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(ascii_uppercase):
        got = f"{value!r:.60}" if "options" in row else "missing"
        raise ValueError(f"options is {got}, wanted a list of 2 to {len(ascii_uppercase)} texts")
    for i, item in enumerate(value):
        if not isinstance(item, str) or not item.strip():
            raise ValueError(f"options[{i}] is {item!r:.60}, wanted text that is not empty")
    options = tuple(item.strip() for item in value)
    ends = _ends_of_marks(options)
    return tuple(option[end:] for option, end in zip(options, ends, strict=True)) if ends else options


def written_options(row: Mapping[str, object]) -> tuple[str, ...]:
    """The options of a row that `read_options` takes, byte for byte, with letters in front where it gives none."""
    value = row["options"]
    assert isinstance(value, (list, tuple))
    return tuple(value if _ends_of_marks([item.strip() for item in value]) else marked_options(value))


def _ends_of_marks(options: Sequence[str]) -> list[int] | None:
    """Where the text behind each option's letter begins; None unless every option carries its own."""
    marks = [mark for option in options if (mark := _LETTER_MARK.match(option))]
    is_marked = [mark[1] for mark in marks] == list(ascii_uppercase[: len(options)])
    return [mark.end() for mark in marks] if is_marked else None


def read_true_letter(row: Mapping[str, object], num_options: int) -> str:
    """The capital letter of the right option under "answer", written "C" or "(C)"."""
    letter = read_text(row, "answer").removeprefix("(").removesuffix(")").strip()
    letters = ascii_uppercase[:num_options]
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"answer is {row['answer']!r:.60}, wanted one letter from A to {letters[-1]}")
    return letter


def read_intervals(row: Mapping[str, object]) -> tuple[Interval, ...]:
    """The intervals under "intervals" as they are written, seconds, at least one; see `checked_interval`."""
    return tuple((start_s, end_s) for start_s, end_s in read_rows(row, "intervals", "interval", 2))


def checked_interval(index: int, interval: Interval, duration_s: float | None) -> Interval:
    """The interval with an end after the video's cut off; `index` names it in messages.

    Raises ValueError when it is reversed, empty, or starts outside the video.
    """
    start_s, end_s = interval
    if end_s < start_s:
        raise ValueError(f"interval {index} ends ({end_s} s) before it starts ({start_s} s)")
    if end_s == start_s:
        raise ValueError(f"interval {index} is empty: it starts and ends at {start_s} s")
    if start_s < 0:
        raise ValueError(f"interval {index} starts at {start_s} s, wanted 0 s or later")
    if duration_s is None:
        return interval
    if start_s >= duration_s:
        raise ValueError(f"interval {index} starts at {start_s} s, but the video ends at {duration_s} s")
    return (start_s, min(end_s, duration_s))


def _truth(example: Example, kind: type[TruthKind], wanted: str) -> TruthKind:
    """The example's truth. Raises TypeError when the example belongs to another task and holds another kind."""
    if not isinstance(example.truth, kind):
        raise TypeError(
            f"example {example.id} of task {example.task} holds {type(example.truth).__name__}, not {wanted}"
        )
    return example.truth


interval_truth = partial(_truth, kind=IntervalTruth, wanted="intervals")
track_truth = partial(_truth, kind=TrackTruth, wanted="a track")
choice_truth = partial(_truth, kind=ChoiceTruth, wanted="a choice")
grounded_choice_truth = partial(_truth, kind=GroundedChoiceTruth, wanted="a grounded choice")
label_truth = partial(_truth, kind=LabelTruth, wanted="a label")
number_truth = partial(_truth, kind=NumberTruth, wanted="a number")
caption_truth = partial(_truth, kind=CaptionTruth, wanted="a caption")

# What models say is about clips of which they saw frames up to this far apart: two frames, one step of the model's time
# axis, at the default video.fps of 2. An end so little after the video's is taken for the video's.
END_SLACK_S = 1.0


def without_overshoot(interval: Interval, duration_s: float) -> Interval:
    """A predicted interval as rewards see it: an end at most END_SLACK_S after the video's is cut to that.

    Anything else keeps its value, so that "0 to 9999" costs what it costs in the benchmark.
    """
    start_s, end_s = interval
    if duration_s < end_s <= duration_s + END_SLACK_S:
        return start_s, max(start_s, duration_s)
    return interval


def check_counts(num_examples: int, num_answers: int) -> None:
    """Raises ValueError unless there is one answer per example."""
    if num_examples != num_answers:
        raise ValueError(f"got {num_examples} examples and {num_answers} answers, wanted one answer per example")


def mean(values: list[float]) -> float:
    """Raises ValueError on an empty list: a score over nothing is not 0."""
    if not values:
        raise ValueError("there are no examples to score, wanted at least one")
    return math.fsum(values) / len(values)


def frac_at_least(values: list[float], threshold: float) -> float:
    """Share of the values that reach the threshold (>=, as the usual R@threshold)."""
    return mean([float(value >= threshold) for value in values])
