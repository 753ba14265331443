"""Checks on the numbers of an annotation row. Called by the tasks; raises ValueError with one reason."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vcr1_fast.types import Example, IntervalTruth, TrackTruth


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


def interval_truth(example: Example) -> IntervalTruth:
    """The truth of a temporal example. Raises TypeError when the example belongs to another task."""
    if not isinstance(example.truth, IntervalTruth):
        raise TypeError(
            f"example {example.id} of task {example.task} holds {type(example.truth).__name__}, not intervals"
        )
    return example.truth


def track_truth(example: Example) -> TrackTruth:
    """The truth of a tracking example. Raises TypeError when the example belongs to another task."""
    if not isinstance(example.truth, TrackTruth):
        raise TypeError(
            f"example {example.id} of task {example.task} holds {type(example.truth).__name__}, not a track"
        )
    return example.truth


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
