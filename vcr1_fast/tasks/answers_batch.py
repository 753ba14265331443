"""Reads a whole batch of completions in one call. Called by the tasks, once per batch of answers.

Each function equals the reader of one text (`answer_format`, `glue_format`, `choice_format`), applied to the first
MAX_TEXT_CHARS characters of every text; those define what is correct. The compiled module does the same bit for bit,
without the interpreter's lock; which of the two is used is decided once, at import, and `native.status()` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from vcr1_fast import native
from vcr1_fast.tasks.answer_format import (
    BoxList,
    clip,
    has_paper_format,
    has_strict_format,
    read_box_list,
    read_paper_period,
    read_period,
    tag_blocks,
)
from vcr1_fast.tasks.choice_format import read_choice, read_paper_choice
from vcr1_fast.tasks.glue_format import read_glue, read_paper_glue
from vcr1_fast.types import Interval

Rule = Literal["fixed", "paper"]  # as task.recipe
Pick = Literal["first", "last"]  # which block of the tag is read
Value = TypeVar("Value")


def read_periods(texts: Sequence[str], rule: Rule, tag: str = "answer", pick: Pick = "last") -> list[Interval | None]:
    """`read_period` or `read_paper_period` of a block of each text; None where there is no such block or period."""
    return _read_periods(texts, rule, tag, pick)


def read_box_lists(texts: Sequence[str], rule: Rule, tag: str = "answer", pick: Pick = "last") -> list[BoxList | None]:
    """`read_box_list` of a block of each text; rule paper takes newlines out first, as the original does."""
    return _read_box_lists(texts, rule, tag, pick)


def read_glues(texts: Sequence[str], rule: Rule, tag: str = "glue", pick: Pick = "last") -> list[list[Interval] | None]:
    """`read_glue` or `read_paper_glue` of a block of each text; None where there is none or it is not valid."""
    return _read_glues(texts, rule, tag, pick)


def read_choices(
    texts: Sequence[str], options: Sequence[Sequence[str]], tag: str = "answer", pick: Pick = "last"
) -> list[str | None]:
    """`read_choice` of a block of each text, with the options of its question.

    Raises ValueError unless there is one list of options per text.
    """
    if len(texts) != len(options):
        raise ValueError(f"got {len(texts)} texts and {len(options)} lists of options, wanted one list per text")
    return _read_choices(texts, options, tag, pick)


def read_paper_choices(texts: Sequence[str], tag: str = "answer", pick: Pick = "first") -> list[str | None]:
    """`read_paper_choice` of a block of each text."""
    return _read_paper_choices(texts, tag, pick)


def have_format(texts: Sequence[str], rule: Rule, think: bool, blocks: tuple[str, ...] = ("answer",)) -> list[bool]:
    """`has_strict_format` or `has_paper_format` of each text."""
    return _have_format(texts, rule, think, blocks)


# The definitions, one text after the other.


def read_periods_plain(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[Interval | None]:
    return _read_blocks(texts, read_paper_period if rule == "paper" else read_period, tag, pick)


def read_glues_plain(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[list[Interval] | None]:
    return _read_blocks(texts, read_paper_glue if rule == "paper" else read_glue, tag, pick)


def read_box_lists_plain(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[BoxList | None]:
    if rule == "paper":
        texts = [clip(text).replace("\n", "") for text in texts]
    return _read_blocks(texts, read_box_list, tag, pick)


def read_choices_plain(
    texts: Sequence[str], options: Sequence[Sequence[str]], tag: str, pick: Pick
) -> list[str | None]:
    letters: list[str | None] = []
    for text, choices in zip(texts, options, strict=True):
        letters += _read_blocks([text], lambda block, choices=choices: read_choice(block, choices), tag, pick)
    return letters


def read_paper_choices_plain(texts: Sequence[str], tag: str, pick: Pick) -> list[str | None]:
    return _read_blocks(texts, read_paper_choice, tag, pick)


def have_format_plain(texts: Sequence[str], rule: Rule, think: bool, blocks: tuple[str, ...]) -> list[bool]:
    has_format = has_paper_format if rule == "paper" else has_strict_format
    return [has_format(clip(text), think, blocks) for text in texts]


def _read_blocks(texts: Sequence[str], read: Callable[[str], Value | None], tag: str, pick: Pick) -> list[Value | None]:
    values: list[Value | None] = []
    for text in texts:
        blocks = tag_blocks(clip(text), tag)
        values.append(read(blocks[0 if pick == "first" else -1]) if blocks else None)
    return values


# The same in one call of the compiled module, which must be there.


def read_periods_native(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[Interval | None]:
    from vcr1_fast import _native

    return _native.read_periods(list(texts), tag, pick, rule)


def read_glues_native(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[list[Interval] | None]:
    from vcr1_fast import _native

    return _native.read_glues(list(texts), tag, pick, rule)


def read_box_lists_native(texts: Sequence[str], rule: Rule, tag: str, pick: Pick) -> list[BoxList | None]:
    from vcr1_fast import _native

    return _native.read_box_lists(list(texts), tag, pick, rule)


def read_choices_native(
    texts: Sequence[str], options: Sequence[Sequence[str]], tag: str, pick: Pick
) -> list[str | None]:
    """Texts with characters beyond ASCII in the block or the options go to `read_choice`: case folding is Python's."""
    from vcr1_fast import _native

    letters, left = _native.read_choices(list(texts), list(options), tag, pick)
    if left:
        rest = read_choices_plain([texts[i] for i in left], [options[i] for i in left], tag, pick)
        for i, letter in zip(left, rest, strict=True):
            letters[i] = letter
    return letters


def read_paper_choices_native(texts: Sequence[str], tag: str, pick: Pick) -> list[str | None]:
    from vcr1_fast import _native

    return _native.read_paper_choices(list(texts), tag, pick)


def have_format_native(texts: Sequence[str], rule: Rule, think: bool, blocks: tuple[str, ...]) -> list[bool]:
    from vcr1_fast import _native

    return _native.have_format(list(texts), ["think", *blocks] if think else list(blocks), rule)


# which ones are used is decided here, once
_is_native = native.is_available()
_read_periods = read_periods_native if _is_native else read_periods_plain
_read_glues = read_glues_native if _is_native else read_glues_plain
_read_box_lists = read_box_lists_native if _is_native else read_box_lists_plain
_read_choices = read_choices_native if _is_native else read_choices_plain
_read_paper_choices = read_paper_choices_native if _is_native else read_paper_choices_plain
_have_format = have_format_native if _is_native else have_format_plain
