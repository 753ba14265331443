"""Reads completions: think and answer tags, "X to Y" periods, lists of boxes. Called by the tasks.

A completion is text from a model and is treated as hostile: nothing is evaluated, every function takes time linear in
the text, and only the first MAX_TEXT_CHARS characters count. Nothing here raises on any string.
"""

from __future__ import annotations

import re
from itertools import pairwise

from vcr1_fast.tasks.answer_times import TIME, are_finite, has_other_unit, one_blank_each, to_interval
from vcr1_fast.types import Interval

MAX_TEXT_CHARS = 65536  # a longest sane completion, 2,048 tokens, is about 8,000 characters
MAX_LIST_DEPTH = 8
MAX_LIST_ITEMS = 4096

# What a box list may hold. None: a value that is legal there but not a number (a string, None, a deeper list).
Scalar = float | None
BoxList = list[list[Scalar]]


def clip(text: str) -> str:
    """The part of a completion that is read: its first MAX_TEXT_CHARS characters."""
    return text[:MAX_TEXT_CHARS]


def tag_blocks(text: str, tag: str) -> list[str]:
    """What stands between each `<tag>` and the nearest `</tag>` after it, left to right, without overlap."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    blocks: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break
        blocks.append(text[start:end])
        position = end + len(closing)
    return blocks


def has_strict_format(text: str, think: bool, blocks: tuple[str, ...] = ("answer",)) -> bool:
    """Whether the text is one think block, then the named blocks, with nothing but blanks around them.

    think=False wants no think block. Each tag must occur exactly once (the paper's test lets them repeat), and the
    answer block is never left out of the count.
    """
    text = text.strip()
    names = ("think", *blocks) if think else blocks
    for name in {"think", "answer", *blocks}:
        if text.count(f"<{name}>") != (name in names) or text.count(f"</{name}>") != (name in names):
            return False
    position = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        start, end = text.index(opening), text.index(closing)
        if start < position or end < start + len(opening) or text[position:start].strip():
            return False
        position = end + len(closing)
    return position == len(text)


def has_paper_format(text: str, think: bool, blocks: tuple[str, ...] = ("answer",)) -> bool:
    """The original's test: the stripped text is fully matched by think block, blanks, the named blocks with blanks.

    A dot in its pattern matches any text, tags included, so repeated inner tags pass. Taking the first place where one
    block ends and the next begins leaves the most text to the rest, so no other place has to be tried: linear time.
    """
    text = text.strip()
    names = ("think", *blocks) if think else blocks
    if not text.startswith(f"<{names[0]}>"):
        return False
    position = len(f"<{names[0]}>")
    for name, following in pairwise(names):
        border = re.compile(rf"</{name}>\s*+<{following}>").search(text, position)
        if border is None:
            return False
        position = border.end()
    closing = f"</{names[-1]}>"
    return text.endswith(closing) and len(text) - len(closing) >= position


# Nothing is read out of the middle of "1e3", "3-4", "1.2.3", "12/30" or "12,5". (?ai:) keeps the words ASCII.
_PERIOD = re.compile(rf"(?<![\w.:+-])(?<![0-9][,/])({TIME})[ \n]?(?ai:to|and)[ \n]?({TIME})(?![\w:]|[.,/-][0-9])")


def read_period(text: str) -> Interval | None:
    """The last "X to Y" (or "X and Y") of the text in seconds, as written: signs kept, order not checked.

    X and Y are seconds, mm:ss, hh:mm:ss or minutes, see `answer_times`; any blanks are tolerated ("2.5s to 4 s"). None
    when there is none, it is in another unit ("12 to 20 frames", "25 to 50 percent"), or a number is not finite.
    """
    text = one_blank_each(text)
    matches = list(_PERIOD.finditer(text))
    if not matches or has_other_unit(text, *matches[-1].span()):
        return None
    interval = to_interval(*matches[-1].groups())
    return interval if interval is not None and are_finite(interval) else None


_PAPER_SEPARATOR = re.compile(r" (?:to|and) ")
_PAPER_SEPARATOR_ANY_CASE = re.compile(_PAPER_SEPARATOR.pattern, re.IGNORECASE)


def read_paper_period(text: str, *, ignore_case: bool = True) -> Interval | None:
    """The original's rule: the last "number to|and number" with exactly one blank on each side of the word.

    Its reward ignores the word's case, its evaluation does not.
    Numbers are unsigned decimals `\\d+\\.?\\d*`, so a minus sign is dropped and "12.5s to" cannot be read. Equals the
    last of the pattern's matches from left to right, but grows outwards from the words, which keeps the time linear.
    """
    last: Interval | None = None
    free_from = 0  # matches do not overlap
    for separator in (_PAPER_SEPARATOR_ANY_CASE if ignore_case else _PAPER_SEPARATOR).finditer(text):
        start = _decimal_start(text, separator.start(), free_from)
        end = _decimal_end(text, separator.end())
        if start < separator.start() and end > separator.end():
            last = (float(text[start : separator.start()]), float(text[separator.end() : end]))
            free_from = end
    return last


def _decimal_start(text: str, end: int, floor: int) -> int:
    """Where the longest `\\d+\\.?\\d*` that ends at `end` starts, at `floor` or later; `end` if there is none."""
    start = end
    while start > floor and text[start - 1].isdecimal():
        start -= 1
    if start > floor and text[start - 1] == ".":
        whole = start - 1
        while whole > floor and text[whole - 1].isdecimal():
            whole -= 1
        if whole < start - 1:
            return whole
    return start


def _decimal_end(text: str, start: int) -> int:
    """Where the longest `\\d+\\.?\\d*` that starts at `start` ends; `start` if there is none."""
    end = start
    while end < len(text) and text[end].isdecimal():
        end += 1
    if end > start and text[end : end + 1] == ".":
        end += 1
        while end < len(text) and text[end].isdecimal():
            end += 1
    return end


_TOKEN = re.compile(
    r"[ \t\r\n\f]*+(?:"
    r"(?P<number>[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)(?![\w.])"
    r"|(?P<string>'(?:[^'\\\n]|\\.)*+'|\"(?:[^\"\\\n]|\\.)*+\")"
    r"|(?P<name>True|False|None)(?!\w)"
    r"|(?P<mark>[\[\],]))"
)


class _ListReader:
    """Reads one Python-style list: numbers, strings, True, False, None and nested lists, within fixed bounds."""

    def __init__(self, text: str) -> None:
        self.text = text.rstrip()
        self.position = 0
        self.num_items = 0
        self.kind = ""
        self.value = ""

    def advance(self) -> None:
        """To the next token; kind "end" after the last one, "bad" where there is no token."""
        if self.position == len(self.text):
            self.kind = "end"
            return
        match = _TOKEN.match(self.text, self.position)
        self.kind = "bad" if match is None else str(match.lastgroup)
        if match is not None:
            self.value = match[self.kind]
            self.position = match.end()

    def read_list(self, depth: int) -> list[object] | None:
        """The list whose "[" is the current token; stops on its "]". None if it is malformed or out of bounds."""
        items: list[object] = []
        self.advance()
        while not (self.kind == "mark" and self.value == "]"):
            item = self.read_value(depth)
            self.num_items += 1
            if item is _BAD or self.num_items > MAX_LIST_ITEMS:
                return None
            items.append(item)
            self.advance()
            if self.kind == "mark" and self.value == ",":
                self.advance()  # a comma may be the last thing in a list
            elif not (self.kind == "mark" and self.value == "]"):
                return None
        return items

    def read_value(self, depth: int) -> object:
        """The value at the current token: a float, a list, or None for what is not a number."""
        if self.kind == "number":
            digits = self.value.lstrip("+-")
            if digits.isdecimal() and digits.startswith("0") and digits.strip("0"):
                return _BAD  # 012 is not a number in Python or JSON
            return float(self.value)
        if self.kind == "name" and self.value != "None":
            return float(self.value == "True")  # as Python computes with them
        if self.kind in ("string", "name"):
            return None
        if self.kind == "mark" and self.value == "[" and depth < MAX_LIST_DEPTH:
            nested = self.read_list(depth + 1)
            return _BAD if nested is None else nested
        return _BAD


_BAD = object()


def read_box_list(text: str) -> BoxList | None:
    """The text as a list of lists of exactly 4 values, see `read_number_rows`."""
    return read_number_rows(text, 4)


def read_number_rows(text: str, width: int) -> BoxList | None:
    """The text as a list of lists of exactly `width` values; None if it is anything else.

    Numbers become floats (also 1e999 = infinity); a value that is not a number becomes None, whatever it is: the
    original accepts it in the format and fails on it in the IoU.
    """
    reader = _ListReader(text)
    reader.advance()
    if reader.kind != "mark" or reader.value != "[":
        return None
    rows = reader.read_list(depth=1)
    reader.advance()
    if rows is None or reader.kind != "end":
        return None
    numbers: BoxList = []
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            return None
        numbers.append([value if isinstance(value, float) else None for value in row])
    return numbers
