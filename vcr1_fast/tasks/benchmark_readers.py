"""What an answer says by the rule of the benchmark's own evaluation script. Called by the tasks' `metrics`.

Kept apart from what reads answers for rewards: a reward wants its format, a score must be one that others publish,
whatever the recipe. A reader takes the text inside the tag where there is one, else all of the output without its think
block, and returns None where its rule finds nothing. Rules (repository, file):

    read_period    OpenGVLab/VideoChat-R1, src_eval/evaluate_grounding.py
    read_timelens  TencentARC/TimeLens, timelens/utils.py
    read_boxes     the same as read_period, src_eval/evaluate_track.py
    read_evidence  the same, src_eval/evaluate_gqa.py
    read_label     the same, src_eval/evaluate_cls_quality_c8.py
    read_letter    a rule of CHOICE_RULES, by default that of Video-MME
    read_caption   the whole description, as Dream-1K hands it to its judge

A row of multiple_choice or grounded_qa names its rule under "scoring", for example {"scoring": "mvbench"}. A further
one is a function (text, options) -> letter or None, and one line in CHOICE_RULES.

Nothing here raises on any string, and every function takes time linear in it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase

from vcr1_fast.tasks.answer_format import read_box_list, read_number_rows, read_paper_period, tag_blocks
from vcr1_fast.tasks.choice_format import PAPER_NUM_LETTERS, read_paper_choice
from vcr1_fast.tasks.glue_format import read_paper_glue
from vcr1_fast.types import Box, Interval

ChoiceRule = Callable[[str, Sequence[str]], "str | None"]  # (text, options) -> letter


def read_period(output: str) -> Interval | None:
    """The last "12.5 to 17" or "12.5 and 17" in seconds, one blank on each side of the word; order not checked.

    The script looks in the whole output, the think block too, so that is where a period comes from when the last answer
    block has none. An answer block goes before what follows it, which the script does not do.
    """
    blocks = tag_blocks(output, "answer")
    inside = _read_period(blocks[-1]) if blocks else None
    return inside or _read_period(output)


def _read_period(text: str) -> Interval | None:
    return read_paper_period(text, ignore_case=False)


_CLOCK = re.compile(r"\b\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?\b")  # mm:ss or hh:mm:ss, with fractions or not
_SECONDS = r"(\d++\.?+\d*+)"
_SPANS = tuple(re.compile(rf"(?<!\d){_SECONDS}{joint}{_SECONDS}") for joint in (r"\s*+-\s*+", r"\s++to\s++"))
_BARE = re.compile(r"\b(?:\d++\.\d++|\d++)\b")


def read_timelens(output: str) -> Interval | None:
    """The first period of all of the output: of two clock times; else "a - b"; else "a to b"; else of two numbers.

    Clock times and bare numbers are whole words to the script: "12s" is no number, and of "3.5s" it reads the 3. None
    where the period does not end after it begins: its IoU is 0 there, too.
    """
    text = output.lower()
    found: Sequence[str] = [clock[0] for clock in itertools.islice(_CLOCK.finditer(text), 2)]
    for pattern in _SPANS:
        if len(found) < 2:
            span = pattern.search(text)
            found = span.groups() if span else ()
    if len(found) < 2:
        found = [number[0] for number in itertools.islice(_BARE.finditer(text), 2)]
    if len(found) < 2:
        return None
    start_s, end_s = map(_clock_s, found)
    return (start_s, end_s) if start_s < end_s < math.inf else None


def _clock_s(text: str) -> float:
    """Seconds of "hh:mm:ss", "mm:ss" or "ss", the last with or without a fraction."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def read_boxes(output: str) -> list[Box] | None:
    """All of the text as a list of boxes, newlines taken out: lists of 4 finite numbers. A ``` fence is taken off."""
    rows = read_box_list(_unfenced(_said(output, "answer")).replace("\n", ""))
    boxes: list[Box] = []
    for x0, y0, x1, y1 in rows or []:
        if x0 is None or y0 is None or x1 is None or y1 is None or not all(map(math.isfinite, (x0, y0, x1, y1))):
            return None
        boxes.append((x0, y0, x1, y1))
    return boxes or None


def read_evidence(output: str) -> list[Interval] | None:
    """The list "[(5.2, 10.4), ...]" in seconds, possibly empty; see `glue_format.read_paper_glue`.

    Inside a ``` fence blanks around it do not matter, and pairs may be JSON: [[5.2, 10.4], ...].
    """
    said = _said(output, "glue", besides="answer")
    if FENCE not in said:
        return read_paper_glue(said)
    inside = _unfenced(said)
    intervals = read_paper_glue(inside)
    return _read_pairs(inside) if intervals is None else intervals


def _read_pairs(text: str) -> list[Interval] | None:
    """A JSON list of pairs; None if it is anything else or one is negative, infinite or ends before it starts."""
    intervals: list[Interval] = []
    for start_s, end_s in read_number_rows(text, 2) or []:
        if start_s is None or end_s is None or not 0.0 <= start_s <= end_s < math.inf:
            return None
        intervals.append((start_s, end_s))
    return intervals or None


def read_label(output: str) -> str | None:
    """All of the text in lower case, without blanks around it."""
    return _said(output, "answer").strip().lower() or None


def read_caption(output: str) -> str:
    """The description: the last answer block, else all of the text; "" where it holds no letter or digit."""
    blocks = tag_blocks(output, "answer")
    caption = (blocks[-1] if blocks else _without(output, "think")).strip()
    return caption if any(character.isalnum() for character in caption) else ""


def read_letter(output: str, options: Sequence[str], scoring: str) -> str | None:
    """The letter that the rule `scoring` finds. Raises KeyError where CHOICE_RULES has none of that name."""
    return CHOICE_RULES[scoring](_said(output, "answer", besides="glue"), options)


def read_videomme(text: str, options: Sequence[str]) -> str | None:
    """The first capital from A to D anywhere: EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/videomme/utils.py.

    So until April 2026, when that script began to rank several patterns (_task_utils/mcq_extract.py). With more than
    the benchmark's 4 options their letters count, too. "It is a dog" names none, "Because" names B. (The phrases that
    the script takes out hold no such capital, but for one that it spells wrongly, see PAPER_PREFIXES.)
    """
    return read_paper_choice(text, ascii_uppercase[: max(4, len(options))])


def read_videochat_r1(text: str, options: Sequence[str]) -> str | None:
    """The first capital from A to G: OpenGVLab/VideoChat-R1, src_eval/evaluate_qa.py and evaluate_gqa.py."""
    return read_paper_choice(text, ascii_uppercase[:PAPER_NUM_LETTERS])


_CAPITAL = re.compile(r"\b([A-D])\b")


def read_perception_test(text: str, options: Sequence[str]) -> str | None:
    """The first word that is a capital from A to D: lmms-eval, lmms_eval/tasks/perceptiontest/val/utils.py."""
    letter = _CAPITAL.search(text)
    return letter[1] if letter else None


_MVBENCH_MARKED = re.compile(r"([A-E])\.\s*+[^\n]+", re.IGNORECASE)  # "C. a cat"
_MVBENCH_LETTER = re.compile(r"\b([A-E])\b", re.IGNORECASE)
_MVBENCH_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
_MVBENCH_MAX_DOTS = 32  # the script hands re.UNICODE, which is 32, to re.sub as its count
_MVBENCH_DOT = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


def read_mvbench(text: str, options: Sequence[str]) -> str | None:
    """The first word that is a letter from A to E, small or capital: lmms-eval, lmms_eval/tasks/mvbench/utils.py.

    So the article in "It is a dog, (C)" names A. "C. a cat" at the start is C. Each kind of punctuation is deleted
    where one of it stands beside a blank or the text has a number such as 1,000; else it becomes a blank.
    """
    text = text.strip()
    marked = _MVBENCH_MARKED.fullmatch(text)
    if marked:
        return marked[1].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for sign in _MVBENCH_PUNCTUATION:
        is_deleted = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text) is not None
        plain = plain.replace(sign, "" if is_deleted else " ")
    letter = _MVBENCH_LETTER.search(_MVBENCH_DOT.sub("", plain, count=_MVBENCH_MAX_DOTS).lower())
    return letter[1].upper() if letter else None


def read_longvideobench(text: str, options: Sequence[str]) -> str | None:
    """The first capital from A to E: lmms-eval, lmms_eval/tasks/longvideobench/utils.py.

    Without the phrases that the script takes out, of which two hold such a capital. Where it finds none it picks a
    letter at random; here that is no answer.
    """
    letter = re.search("[A-E]", text.replace("Best answer:", "").replace("Best option:", ""))
    return letter[0] if letter else None


def read_mlvu(text: str, options: Sequence[str]) -> str | None:
    """The character before the first ")", else all of the text.

    JUNJIE99/MLVU, evaluation/multiple_choice_evaluation/choice_bench.py. Its prompts end in "Best Option: (", so that
    an answer goes on with "A) a cat". "C" is C, "C." is none.
    """
    before, bracket, _ = text.partition(")")
    return _as_letter(before[-1:] if bracket else text.strip(), options)


def read_vsibench(text: str, options: Sequence[str]) -> str | None:
    """The first word, without full stops at its end, whatever the case: vision-x-nyu/thinking-in-space,
    lmms_eval/tasks/vsibench/utils.py. "C. a cat" is C, "(C)" is none."""
    return _as_letter(text.strip().split(" ")[0].rstrip(".").strip().upper(), options)


def _as_letter(text: str, options: Sequence[str]) -> str | None:
    return text if len(text) == 1 and text in ascii_uppercase[: len(options)] else None


CHOICE_RULES: dict[str, ChoiceRule] = {
    "videomme": read_videomme,
    "mvbench": read_mvbench,
    "perception_test": read_perception_test,
    "longvideobench": read_longvideobench,
    "mlvu": read_mlvu,
    "vsibench": read_vsibench,
    "videochat_r1": read_videochat_r1,
}
FENCE = "```"


def _said(output: str, tag: str, besides: str = "") -> str:
    """The first block of the tag, as the scripts take it; without one all of the output but think and `besides`."""
    blocks = tag_blocks(output, tag)
    if blocks:
        return blocks[0]
    rest = _without(output, "think")
    return (_without(rest, besides) if besides else rest).strip()


def _without(text: str, tag: str) -> str:
    """The text without what stands from the first opening tag to the last closing one.

    A block that was never closed, as of an answer cut off in its thoughts, reaches to the end. One that the prompt has
    opened reaches from the start.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    start, end = text.find(opening), text.rfind(closing)
    if end < 0:
        return text if start < 0 else text[:start]
    before = text[:start] if 0 <= start < end else ""
    return before + text[end + len(closing) :]


_LANGUAGE = re.compile(r"[A-Za-z]*+\s*+")


def _unfenced(text: str) -> str:
    """What the first ``` fence holds, without its language and blanks around it; without a fence the text itself."""
    _, fence, inside = text.partition(FENCE)
    if not fence:
        return text
    language = _LANGUAGE.match(inside)
    return inside[language.end() if language else 0 :].partition(FENCE)[0].strip()
