"""From models with few blocks, and few rows, to whole ones: blocks of one kind are equal, and so are a rank's rows.

Every count is a x blocks + b, and so are live bytes by kind at the peak of each phase; the phases of `learner.py` are
short enough for that: within one of them the same thing is always the largest. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SMALL = (4, 7, 1)  # decoder layers, tower blocks with windows, and those that see whole frames: two units of FSDP, of
# which the one gathered ahead is not the last. One unit alone would never have a second beside it.
STEP = (2, 4, 4)  # more of each kind: tower blocks are sharded four at a time
Size = tuple[int, int, int]
Report = Mapping[str, Any]  # dataclasses.asdict(learner.Measured), or a sum of such


def sizes_to_run() -> list[Size]:
    """The models to run: a small one, and for each kind of block one with more of them."""
    return [SMALL, *(_deeper(kind) for kind in range(3))]


def _deeper(kind: int) -> Size:
    layers, windowed, full = (n + (STEP[kind] if k == kind else 0) for k, n in enumerate(SMALL))
    return layers, windowed, full


def to_blocks(reports: Mapping[Size, Report], blocks: Size) -> dict[str, Any]:
    """One phase of a model with `blocks`, from that of the models in `sizes_to_run`."""
    terms: list[tuple[float, Report]] = [(1.0, reports[SMALL])]
    for size, report in reports.items():
        kinds = [index for index in range(3) if size[index] != SMALL[index]]
        if kinds:
            times = (blocks[kinds[0]] - SMALL[kinds[0]]) / STEP[kinds[0]]
            terms += [(times, report), (-times, reports[SMALL])]
    return combined(terms)


def to_rows(one: Report, two: Report, num_rows: int) -> dict[str, Any]:
    """An update of `num_rows` rows from one of one row and one of two. Further ones do not take more memory."""
    more = combined([(num_rows - 1.0, two), (2.0 - num_rows, one)])
    return more | {"peaks": (one if num_rows == 1 else two)["peaks"]}


def combined(terms: Sequence[tuple[float, Any]]) -> Any:
    """Sum of factor x report, number by number through nested mappings; lists count by their length."""
    first = terms[0][1]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for _, value in terms for key in value)
        return {key: combined([(factor, _or_zero(value, key, terms)) for factor, value in terms]) for key in keys}
    numbers = [(factor, len(value) if isinstance(value, list) else value) for factor, value in terms]
    total = sum(factor * value for factor, value in numbers)
    return total if any(isinstance(value, float) for _, value in numbers) else round(total)


def _or_zero(value: Mapping[str, Any], key: str, terms: Sequence[tuple[float, Any]]) -> Any:
    if key in value:
        return value[key]
    like = next(other[key] for _, other in terms if key in other)
    return {} if isinstance(like, Mapping) else [] if isinstance(like, list) else 0


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once, in which phase, and what they were."""

    num_bytes: int
    phase: str
    kinds: dict[str, int]


def peak_of(report: Report) -> Peak:
    """Over all phases."""
    totals = {phase: sum(kinds.values()) for phase, kinds in report["peaks"].items()}
    phase = max(totals, key=lambda name: totals[name])
    kinds = {kind: int(size) for kind, size in report["peaks"][phase].items() if size > 0}
    return Peak(int(totals[phase]), phase, kinds)
