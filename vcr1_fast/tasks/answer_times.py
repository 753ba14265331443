"""A time inside of an answer: seconds, mm:ss, hh:mm:ss or minutes -> seconds. Called by the readers of recipe fixed.

What carries another unit (frames, percent, hours) is no time. Neither is a number with a comma in it: "12,5" may be
12.5, "1,250" 1250 and "(3,4)" a list, and the question asks for a point.
"""

from __future__ import annotations

import math
import re

from vcr1_fast.types import Interval

_BLANK = r"[ \n]?"  # what `one_blank_each` leaves of any blanks
# ASCII only, and possessive (++, *+) or atomic (?>...): without backtracking a run of n digits costs n, not n squared.
_NUMBER = r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)"
_CLOCK = r"[0-9]++(?::[0-5][0-9]){1,2}+(?:\.[0-9]++)?+(?![0-9:])"
_SECONDS = r"(?ai:seconds?|secs?|s)(?!\w)"
_MINUTES = r"(?ai:minutes?|mins?|m)(?![^\W\d])"
_REST = rf",?{_BLANK}(?:(?ai:and)[ \n])?[0-5]?[0-9](?:\.[0-9]*+)?{_BLANK}{_SECONDS}"  # "1 min 30 s", "1m30s"
_MINUTES_ALONE = rf"{_MINUTES}(?!\w|{_BLANK}[0-9])"

_UNIT = rf"{_SECONDS}|{_MINUTES_ALONE}"
TIME = rf"(?>{_CLOCK}(?:{_BLANK}(?:{_UNIT}))?|{_NUMBER}(?:{_BLANK}(?:{_MINUTES}{_REST}|{_UNIT}))?)"

# A word behind a number is its unit, unless it is one of these.
_PROSE = (
    "a|about|after|an|and|approximately|as|at|because|before|but|by|during|for|from|he|her|his|i|if|in|inside|into|is|it|"
    "its|no|not|of|on|or|she|since|so|that|the|their|then|there|they|this|to|until|we|when|where|which|while|with|within|"
    "you"
)
_UNIT_BEHIND = re.compile(rf"[)\]}}]?(?:{_BLANK}%| (?!(?ai:{_PROSE}|seconds?|secs?)(?!\w))\w)")
# And "frames 12 to 20", "1 hour and 2 minutes to ...": what stands in front of a number and is not its own.
_UNIT_IN_FRONT = re.compile(
    rf"(?<!\w)(?ai:frames?|percent|hours?|hrs?|h|minutes?|mins?|m),?{_BLANK}(?:(?ai:and)[ \n])?\Z"
)
_IN_FRONT_CHARS = 24  # more than the longest of them
_PARTS = re.compile(r"(?P<value>[0-9+.:-]++)[ \n]?(?:(?P<is_minutes>[mM])[^0-9]*+(?P<rest>[0-9.]*+))?")


def one_blank_each(text: str) -> str:
    """One blank for each run of blanks, a newline where the run holds one, none at the ends; "-" for a minus sign.

    Runs of blanks would cost the patterns their length squared.
    """
    lines = (" ".join(line.split()) for line in text.replace("\N{MINUS SIGN}", "-").split("\n"))
    return "\n".join(line for line in lines if line)


def has_other_unit(text: str, start: int, end: int) -> bool:
    """Whether a unit that is none of TIME's stands in front of the first time, at `start`, or behind the last one."""
    in_front = _UNIT_IN_FRONT.search(text[max(0, start - _IN_FRONT_CHARS) : start])
    return bool(in_front) or (not text[end - 1].isalpha() and bool(_UNIT_BEHIND.match(text, end)))


def to_interval(start: str, end: str) -> Interval | None:
    """Seconds of two texts that match TIME, infinite ones too. A unit behind the second one is that of both.

    None for "1 min to 90": whose unit the second number has is not said.
    """
    start_s, start_kind = _seconds(start)
    end_s, end_kind = _seconds(end)
    if end_kind == "minutes" and start_kind == "bare":
        start_s *= 60.0
    is_unclear = start_kind == "minutes" and end_kind == "bare"
    return None if is_unclear else (start_s, end_s)


def _seconds(time: str) -> tuple[float, str]:
    """Seconds, and what the text says of its unit: "bare", "minutes", or "" where it is seconds for certain."""
    parts = _PARTS.match(time)
    assert parts is not None, time
    value, rest = parts["value"], parts["rest"]
    if ":" in value:
        seconds = 0.0
        for part in value.split(":"):
            seconds = seconds * 60.0 + float(part)
        return seconds, "minutes" if parts["is_minutes"] else ""
    if parts["is_minutes"]:
        return float(value) * 60.0 + (float(rest) if rest else 0.0), "minutes"
    return float(value), "bare" if parts.end() == len(time) else ""


def are_finite(interval: Interval) -> bool:
    return all(map(math.isfinite, interval))
