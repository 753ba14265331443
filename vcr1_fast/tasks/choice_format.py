"""Lists the options of a question and reads the letter out of an answer. Called by the multiple-choice tasks.

Nothing here raises on any string, and every function takes time linear in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

PAPER_NUM_LETTERS = 7  # the original looks for A to G


def marked_options(options: Sequence[str], style: str = "({}) {}") -> list[str]:
    """Each option with its letter in front: "(A) a cat", "(B) a dog"."""
    return [style.format(letter, option) for letter, option in zip(ascii_uppercase, options, strict=False)]


def most_common(values: Iterable[str]) -> str:
    """The most frequent value, the alphabetically first of several; "" when there are none."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default="")


_EDGES = " .,:;!?*_`'\"()[]{}\u2018\u2019\u201c\u201d"
# "The answer is", "Answer:", "Correct option"
_LEAD_IN = re.compile(
    r"(?:the |my )?(?:(?:best|correct|final|right) )?(?:answer|option|choice)\b(?: is)?(?: ?:)? ?", re.I
)
# a letter in front of more text: "(C) text", "C) text", "C. text", "C - text", "C text"
_MARK = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:,]+ ?| - | )")
# A letter that stands for an option: in brackets, or a capital on its own that is neither the article A before a word
# ("A boy runs") nor the pronoun I.
_MENTION = re.compile(
    r"(?<!\w)[(\[] ?([A-Za-z]) ?[)\]]"
    r"|(?<![\w'\u2019-])(?!A (?!(?:and|or|is|because|since|as|but|not)\b)\w)(?!I \w)([A-Z])(?![\w'\u2019-])"
)


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """The one letter that the text names, or None.

    Read as C: "C", "c", "(C)", "C.", "C) text", "Answer: C", "the answer is (C)", and the whole text of option C, with
    its letter or without. None: no letter ("Because ..."), several different letters, a letter beyond the options, the
    letter of one option with the text of another, and a text that two options share.
    """
    text = " ".join(text.split())
    letters = ascii_uppercase[: len(options)]
    lead_in = _LEAD_IN.match(text)
    body = text[lead_in.end() :] if lead_in else text
    alone = body.strip(_EDGES)
    if len(alone) == 1 and alone.isascii() and alone.upper() in letters:
        return alone.upper()
    named = _letters_of(text, options) or _letters_of(body, options)
    if named:
        return named[0] if len(named) == 1 else None
    mark = _MARK.match(body)
    named = _letters_of(body[mark.end() :], options) if mark else []
    if mark and named:
        return mark[1].upper() if mark[1].upper() in named else None
    mentioned = {(match[1] or match[2]).upper() for match in _MENTION.finditer(body)}
    letter = mentioned.pop() if len(mentioned) == 1 else ""
    return letter if letter and letter in letters else None


def _letters_of(text: str, options: Sequence[str]) -> list[str]:
    """Letters of the options whose text this is, whatever the case and the punctuation around it."""
    plain = plain_text(text)
    return [
        letter
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if plain and plain == plain_text(option)
    ]


def plain_text(text: str) -> str:
    """How texts are compared: lower case, single blanks, no punctuation around them."""
    return " ".join(text.split()).strip(_EDGES).casefold()


# Taken out in this order, wherever they stand. The last one lacks a comma in the original, which fuses two phrases into
# one: "Best answer: C" keeps its "Best" and reads as B.
PAPER_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:" + "Best option:",
)
_PAPER_LETTERS = ascii_uppercase[:PAPER_NUM_LETTERS]


def read_paper_choice(text: str, letters: str = _PAPER_LETTERS) -> str | None:
    """The original's rule: the first capital from A to G anywhere, once its stock phrases are taken out.

    "Because" is B and "A boy opens it, so C" is A. None when there is no such capital.
    """
    text = text.strip()
    for prefix in PAPER_PREFIXES:
        text = text.replace(prefix, "")
    return next((character for character in text if character in letters), None)
