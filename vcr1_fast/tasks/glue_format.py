"""Reads the evidence of an answer: lists of intervals such as "[(5.2, 10.4), (30, 31.5)]" from a glue block.

Called by the tasks that ask for evidence. Nothing here raises on any string, and time is linear in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from vcr1_fast.tasks.answer_format import has_paper_format, tag_blocks
from vcr1_fast.tasks.answer_times import TIME, are_finite, one_blank_each, to_interval
from vcr1_fast.types import Interval

MAX_INTERVALS = 64  # NExT-GQA has at most 16 in one answer
MAX_INTEGER_DIGITS = 4300  # Python refuses to evaluate a longer whole number


def glue_text(intervals: Sequence[Interval]) -> str:
    """Intervals as both recipes ask for them: "[(5.20, 10.40), (30.00, 31.50)]"."""
    return "[" + ", ".join(f"({start_s:.2f}, {end_s:.2f})" for start_s, end_s in intervals) + "]"


_PAIR = re.compile(rf"([(\[]) ?({TIME}) ?, ?({TIME}) ?([)\]]) ?")


def read_glue(text: str) -> list[Interval] | None:
    """One to MAX_INTERVALS intervals in seconds, signs kept; None for anything else, or if one is reversed or infinite.

    "[(1, 2.5), (3, 4)]", with any blanks, units ("1.5 s", "0:12", "2 min", see `answer_times`) and a comma at the end;
    pairs may stand in square brackets, and without the outer ones ("(1, 2.5)").
    """
    text = one_blank_each(text).replace("\n", " ")
    position, end = 0, len(text)
    if text.startswith("[") and text.endswith("]") and _read_pair(text, 0, end) is None:
        position, end = 1 + text.startswith(" ", 1), end - 1
    intervals: list[Interval] = []
    while position < end:
        pair = _read_pair(text, position, end)
        if pair is None or len(intervals) == MAX_INTERVALS:
            return None
        interval, position = pair
        if interval is None or not are_finite(interval) or interval[0] > interval[1]:
            return None
        intervals.append(interval)
        if position < end and text[position] != ",":
            return None
        position += 1 + text.startswith(" ", position + 1)
    return intervals or None


def _read_pair(text: str, position: int, end: int) -> tuple[Interval | None, int] | None:
    """A pair in brackets at `position`, and where it ends; None where there is none."""
    match = _PAIR.match(text, position, end)
    if match is None or match[1] + match[4] not in ("()", "[]"):
        return None
    return to_interval(match[2], match[3]), match.end()


# After a comma the original's pattern takes any blank, but Python then evaluates only these.
_PAPER_PAIR = re.compile(r"\(([0-9]++(?:\.[0-9]++)?),[ \t\n\r\f]*+([0-9]++(?:\.[0-9]++)?)\)")
_PAPER_COMMA = re.compile(r",[ \t\n\r\f]*+(?=\()")


def read_paper_glue(text: str) -> list[Interval] | None:
    """The original's validity test, and the intervals as floats if it passes; None if it does not.

    The whole text is "[" pairs "]": unsigned decimals without exponent ("5", "5.2", not "5." or ".5"), blanks only
    after commas, one comma allowed right before "]", one newline allowed after it. A whole number with a leading zero
    or of more than MAX_INTEGER_DIGITS digits fails, as Python does not evaluate it ("05.2" is fine), and so does a pair
    that ends before it starts. The empty list passes.
    """
    text = text.removesuffix("\n")
    if text == "[]":
        return []
    if not (text.startswith("[") and text.endswith("]")):
        return None
    position, end = 1, len(text) - 1
    intervals: list[Interval] = []
    while True:
        pair = _PAPER_PAIR.match(text, position, end)
        if pair is None:
            return None
        start, stop = _evaluated(pair[1]), _evaluated(pair[2])
        if start is None or stop is None or start > stop:
            return None
        intervals.append((_as_float(start), _as_float(stop)))
        position = pair.end()
        if position == end or (position == end - 1 and text[position] == ","):
            return intervals
        comma = _PAPER_COMMA.match(text, position, end)
        if comma is None:
            return None
        position = comma.end()


def has_paper_glue_format(text: str, think: bool) -> bool:
    """The original's format test of grounded questions: the tags in order, and a first glue block that is valid.

    The first glue block of the whole text counts, wherever it stands, for example inside the think block.
    """
    if not has_paper_format(text, think, ("answer", "glue")):
        return False
    return read_paper_glue(tag_blocks(text, "glue")[0]) is not None


def _evaluated(digits: str) -> float | int | None:
    """The number as Python evaluates it; whole numbers stay exact, so that large ones compare as the original does."""
    if "." in digits:
        return float(digits)
    if not digits.strip("0"):
        return 0
    return None if digits.startswith("0") or len(digits) > MAX_INTEGER_DIGITS else int(digits)


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf
