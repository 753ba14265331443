"""The readers of completions: corner cases by hand, the original's patterns as oracle, hostile text, linear time."""

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.tasks.answer_format import (
    MAX_TEXT_CHARS,
    clip,
    has_paper_format,
    has_strict_format,
    read_box_list,
    read_paper_period,
    read_period,
    tag_blocks,
)

PAPER_THINK = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
PAPER_ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)
PAPER_PERIOD = re.compile(r"(\d+\.?\d*) (to|and) (\d+\.?\d*)", re.IGNORECASE)

WORDS = (
    "<think> </think> <answer> </answer> to AND 1 12 . - + s sec seconds e5 inf nan , [ ] [[ ]] 0.5 'a' \" \\ None x :"
)
pieces = st.sampled_from([*WORDS.split(), " ", "  ", "\n", "\t", " to ", " and ", "٣", "\N{MINUS SIGN}", "\x00", "é"])
soup = st.lists(pieces, max_size=40).map("".join)
hostile = st.one_of(soup, st.text(max_size=200))


@settings(max_examples=600)
@given(hostile)
def test_nothing_raises_and_the_originals_patterns_agree(text):
    assert tag_blocks(text, "answer") == re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert has_paper_format(text, think=True) == bool(PAPER_THINK.fullmatch(text.strip()))
    assert has_paper_format(text, think=False) == bool(PAPER_ANSWER.fullmatch(text.strip()))
    found = PAPER_PERIOD.findall(text)
    assert read_paper_period(text) == ((float(found[-1][0]), float(found[-1][2])) if found else None)
    for think in (True, False):
        if has_strict_format(text, think):
            assert has_paper_format(text, think)
    period = read_period(text)
    assert period is None or all(math.isfinite(x) for x in period)
    boxes = read_box_list(text)
    assert boxes is None or all(len(box) == 4 for box in boxes)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["1", "23", ".", "4.", ".5", " ", " to ", " and ", " TO ", "a"]), max_size=25).map("".join)
)
def test_paper_period_equals_the_pattern_on_number_soup(text):
    found = PAPER_PERIOD.findall(text)
    assert read_paper_period(text) == ((float(found[-1][0]), float(found[-1][2])) if found else None)


@pytest.mark.parametrize(
    ("text", "fixed", "paper"),
    [
        ("12.54 to 17.83", (12.54, 17.83), (12.54, 17.83)),
        ("from 2 to 4, no: 3.5 and 6.25 it is", (3.5, 6.25), (3.5, 6.25)),
        ("1 TO 2", (1.0, 2.0), (1.0, 2.0)),
        ("1  to 2", (1.0, 2.0), None),  # two blanks
        ("1\nto\n2", (1.0, 2.0), None),
        ("2.5s to 4 s", (2.5, 4.0), None),  # a unit letter
        ("2.5 to 4s", (2.5, 4.0), (2.5, 4.0)),  # behind the second number it does not disturb the original
        ("3 seconds to 4 sec.", (3.0, 4.0), None),
        ("-3 to 5", (-3.0, 5.0), (3.0, 5.0)),  # the original drops the sign
        ("\N{MINUS SIGN}3 to 5", (-3.0, 5.0), (3.0, 5.0)),
        ("9 to 2", (9.0, 2.0), (9.0, 2.0)),  # order is the caller's business
        ("1e3 to 4", None, (3.0, 4.0)),
        ("0:02 to 0:04", (2.0, 4.0), (2.0, 0.0)),
        ("1 to 4e9", None, (1.0, 4.0)),
        ("inf to 3", None, None),
        ("nan to nan", None, None),
        ("9" * 400 + " to 1", None, (math.inf, 1.0)),  # overflows
        (".5 to 1.", (0.5, 1.0), (5.0, 1.0)),
        ("1 to 2 and 3", (1.0, 2.0), (1.0, 2.0)),  # matches do not overlap
        ("1 to 2.5x", None, (1.0, 2.5)),
        ("one to two", None, None),
        ("", None, None),
    ],
)
def test_periods(text, fixed, paper):
    assert read_period(text) == fixed
    assert read_paper_period(text) == paper


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("00:12 to 1:20.5", (12.0, 80.5)),
        ("0:00:12 to 1:02:03.25", (12.0, 3723.25)),
        ("0:12 s and 75:00", (12.0, 4500.0)),
        ("0 to 1:30", (0.0, 90.0)),  # a plain number is seconds
        ("1:60 to 2:00", None),
        ("0:5 to 0:9", None),  # 5 or 50 seconds?
        ("1:02:03:04 to 2", None),
        ("12 to 20 minutes", (720.0, 1200.0)),  # the unit of both
        ("1.5 min to 2mins", (90.0, 120.0)),
        ("30 s to 2 m", (30.0, 120.0)),
        ("1 min to 90", None),  # minutes or seconds?
        ("1 min 30 s to 2m5.5s", (90.0, 125.5)),
        ("1 Minute and 30 seconds and 2 minutes, 5 sec", (90.0, 125.0)),
        ("1 minute and 90 seconds", (60.0, 90.0)),  # not 150 s: 90 does not go with minutes
        ("2 min 30 to 3 min", None),
        ("12 to 20 frames", None),
        ("12 to 20\nFrames show it", (12.0, 20.0)),  # another line
        ("12 to 20 it is, in the video", (12.0, 20.0)),
        ("Frames 12 to 20", None),
        ("frame 12 to frame 20", None),
        ("2 to 4 s, so 48 to 96 frames", None),  # the last one counts
        ("25 to 50%", None),
        ("25% to 50%", None),
        ("1 to 2 or 25 to 50 %", None),
        ("25 to 50 percent", None),
        ("(12 to 20) seconds", (12.0, 20.0)),
        ("(12 to 20) minutes", None),
        ("12 to 20 ms", None),
        ("1 to 2 hours", None),
        ("1 hour, 2 min to 65 min", None),
        ("1 hour and 2 minutes to 65 minutes", None),
        ("12,0 to 20,0", None),  # once read as 0 to 20
        ("1,250.5 to 1,300", None),
        ("12/30 to 20/30", None),
        ("3 to 12-15", None),
        ("1 to 1.2.3", None),
        ("9" * 308 + " to 2 min", None),  # overflows as seconds
    ],
)
def test_units(text, period):
    assert read_period(text) == period


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("<think>a</think><answer>b</answer>", True, True),
        (" \n<think>a\nb</think> \n <answer>b</answer>\n", True, True),
        ("<think></think><answer></answer>", True, True),
        ("<think>a</think>x<answer>b</answer>", False, False),
        ("<think>a</think><answer>b</answer>.", False, False),
        ("so <think>a</think><answer>b</answer>", False, False),
        ("<answer>b</answer>", False, False),
        ("<think>a<answer>b</answer>", False, False),
        ("<answer>b</answer><think>a</think>", False, False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False, True),  # repeated tags pass the original's test
        ("<think>a</think>b</think><answer>c</answer>", False, True),
        ("<think><think>a</think><answer>c</answer>", False, True),
        ("<think>a</think><answer></answer", False, False),
        ("", False, False),
    ],
)
def test_formats_with_think_block(text, strict, paper):
    assert has_strict_format(text, think=True) is strict
    assert has_paper_format(text, think=True) is paper


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        (" <answer>b</answer> ", True, True),
        ("<answer>b</answer><answer>c</answer>", False, True),
        ("<think>a</think><answer>b</answer>", False, False),
        ("<answer><think>a</think>b</answer>", False, True),
        ("<answer>", False, False),
        ("</answer><answer>", False, False),
    ],
)
def test_formats_without_think_block(text, strict, paper):
    assert has_strict_format(text, think=False) is strict
    assert has_paper_format(text, think=False) is paper


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[[0.1,0.2,0.3,0.4]]", [[0.1, 0.2, 0.3, 0.4]]),
        (" [ [ .1 , 2. , -3 , 1e-1 ] , ] ", [[0.1, 2.0, -3.0, 0.1]]),
        ("[[1,2,3,4],[5,6,7,8]]", [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
        ("[['a',\"b\",None,[1]]]", [[None, None, None, None]]),
        ("[[True,False,1e999,0]]", [[1.0, 0.0, math.inf, 0.0]]),
        ("[]", []),
        ("[1,2,3,4]", None),
        ("[[1,2,3]]", None),
        ("[[1,2,3,4,5]]", None),
        ("[[1,2,3,4]", None),
        ("[[1,2,3,4]] and more", None),
        ("[[1,2,,4]]", None),
        ("[[1 2,3,4]]", None),
        ("[[01,2,3,4]]", None),  # no number in Python either
        ("[(1,2,3,4)]", None),
        ("[[nan,inf,0,0]]", None),
        ("[[1+1,2,3,4]]", None),
        ("[[__import__('os'),2,3,4]]", None),
        ("boxes: [[1,2,3,4]]", None),
        ("", None),
    ],
)
def test_box_lists(text, boxes):
    assert read_box_list(text) == boxes


def test_lists_are_bounded_in_depth_and_length():
    assert read_box_list("[[1,2,3," + "[" * 6 + "]" * 6 + "]]") == [[1.0, 2.0, 3.0, None]]
    assert read_box_list("[[1,2,3," + "[" * 7 + "]" * 7 + "]]") is None
    assert read_box_list("[" * 60000 + "]" * 60000) is None
    assert len(read_box_list("[" + "[1,2,3,4]," * 800 + "]") or []) == 800  # 800 rows and 3,200 numbers: 4,000 items
    assert read_box_list("[" + "[1,2,3,4]," * 820 + "]") is None


def test_only_the_first_64_ki_characters_count():
    assert MAX_TEXT_CHARS == 65536
    assert clip("a" * 65535 + "bc") == "a" * 65535 + "b"


WORST = {
    "digits": "1",
    "dots": "1.",
    "blanks": " ",
    "number blank": "1 ",
    "number to": "1 to ",
    "number unit": "1 s ",
    "minutes": "1 min 2",
    "clocks": "1:02:",
    "commas": "1,",
    "words behind": "1 to 2 aaaa",
    "open tags": "<answer>",
    "think ends": "</think> ",
    "brackets": "[",
    "rows": "[1,2,3,4],",
    "backslashes": "\\",
    "quotes": "'",
    "signs": "-+",
}


@pytest.mark.parametrize("name", WORST)
def test_time_is_linear_in_the_text(name):
    """Quadratic cost on 64 Ki characters would take minutes; each of these takes less than 20 ms."""
    text = (WORST[name] * MAX_TEXT_CHARS)[: MAX_TEXT_CHARS - 40]
    start = time.process_time()
    for variant in (text, "<think>" + text + "</answer>", "1" + text + "to", "[['" + text, "[[" + text):
        read_period(variant)
        read_paper_period(variant)
        read_box_list(variant)
        tag_blocks(variant, "answer")
        has_paper_format(variant, think=True)
        has_strict_format(variant, think=True)
    assert time.process_time() - start < 5.0
