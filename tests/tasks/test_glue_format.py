"""Lists of intervals out of glue blocks: the original's validity rules one by one, and the tolerant reader."""

import ast
import math
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcr1_fast.tasks.answer_format import has_paper_format, has_strict_format
from vcr1_fast.tasks.glue_format import (
    MAX_INTERVALS,
    glue_text,
    has_paper_glue_format,
    read_glue,
    read_paper_glue,
)


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        ("[]", []),
        ("[]\n", []),  # one final newline passes
        ("[(1,2)]", [(1.0, 2.0)]),
        ("[(1, 2)]\n", [(1.0, 2.0)]),
        ("[(5.2, 10.4)]", [(5.2, 10.4)]),
        ("[(5.2,   10.4),\n\t(30, 31.5)]", [(5.2, 10.4), (30.0, 31.5)]),  # any blanks after a comma
        ("[(1, 2),(3, 4),]", [(1.0, 2.0), (3.0, 4.0)]),  # one comma at the end
        ("[(1,\r2)]", [(1.0, 2.0)]),
        ("[(1,\f2)]", [(1.0, 2.0)]),
        ("[(3, 3)]", [(3.0, 3.0)]),  # start = end is valid
        ("[(3, 4), (1, 2), (1, 9)]", [(3.0, 4.0), (1.0, 2.0), (1.0, 9.0)]),  # any order, overlaps
        ("[(0, 1)]", [(0.0, 1.0)]),
        ("[(00, 1)]", [(0.0, 1.0)]),  # zeros alone are a whole number in Python
        ("[(0.50, 01.5)]", [(0.5, 1.5)]),  # a leading zero is fine before a point
        ("[(1, " + "9" * 400 + ".0)]", [(1.0, math.inf)]),
        ("[(1, " + "9" * 4300 + ")]", [(1.0, math.inf)]),
    ],
)
def test_the_original_accepts(text, intervals):
    assert read_paper_glue(text) == intervals


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[ ]",
        "[,]",
        " [(1, 2)]",  # a leading blank
        "\n[(1, 2)]",
        "[(1, 2)] ",
        "[(1, 2)]\n\n",
        "[(1, 2)]\r",
        "[ (1, 2)]",  # blanks anywhere but after a comma
        "[(1, 2) ]",
        "[(1 ,2)]",
        "[(1, 2) ,(3, 4)]",
        "[(1, 2), ]",  # nothing may follow the last comma
        "[(1, 2),,(3, 4)]",
        "[(1, 2)(3, 4)]",
        "[(01, 2)]",  # Python does not evaluate 01
        "[(1, 02)]",
        "[(2, 1)]",  # reversed
        "[(1, 2), (5, 4.99)]",
        "[(-1, 2)]",
        "[(+1, 2)]",
        "[(1., 2)]",
        "[(.5, 2)]",
        "[(1e0, 2)]",
        "[(1_0, 20)]",
        "[(1s, 2s)]",
        "[(1 to 2)]",
        "[(1, 2, 3)]",
        "[(1,)]",
        "[(1, 2,)]",
        "[[1, 2]]",  # lists instead of tuples
        "((1, 2))",
        "(1, 2)",
        "[(1, 2)",
        "[('1', 2)]",
        "[(True, 2)]",
        "[(inf, inf)]",
        "[(\u0661, \u0662)]",  # digits, but not Python's
        "[(1,\u00a02)]",  # blanks for the original's pattern, but not for Python
        "[(1,\v2)]",
        "[(1,\x1c2)]",
        "[(1, 2)], [(3, 4)]",
        "[(1, " + "9" * 4301 + ")]",  # Python evaluates no longer whole number
        "[(9007199254740993, 9007199254740992)]",  # reversed, though the two are one float
    ],
)
def test_the_original_refuses(text):
    assert read_paper_glue(text) is None


def as_python_reads_it(text):
    """The same rules once more, by a pattern on the text without its blanks and by Python's own evaluation."""
    tight = re.sub(r",\s+(?=[(\d])", ",", text.removesuffix("\n"))
    pair = r"\(\d+(\.\d+)?,\d+(\.\d+)?\)"
    if tight != "[]" and not re.fullmatch(rf"\[({pair},)*{pair},?\]", tight):
        return None
    try:
        pairs = ast.literal_eval(text)
    except SyntaxError:
        return None
    return [(float(s), float(e)) for s, e in pairs] if all(s <= e for s, e in pairs) else None


@settings(max_examples=800)
@given(
    st.lists(
        st.sampled_from(["(1, 2)", "(3,4.5)", "(0", "5)", ",", ", ", ",\n", " ", "1", "0", ".", "(", ")", "[", "]"])
    )
    .map("".join)
    .map("[{}]".format)
    | st.text("[](),. 015\n", max_size=14)
)
@example("[(1, 2),]\n")
@example("[(05, 5)]")
def test_the_original_by_two_readers(text):
    assert read_paper_glue(text) == as_python_reads_it(text)


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        ("[(5.2, 10.4)]", [(5.2, 10.4)]),
        ("[(5.2,10.4),(30,31.5)]", [(5.2, 10.4), (30.0, 31.5)]),
        (" [ ( 1 , 2 ) , ( 3 , 4 ) , ] \n", [(1.0, 2.0), (3.0, 4.0)]),
        ("[[1, 2], [3, 4]]", [(1.0, 2.0), (3.0, 4.0)]),
        ("(1, 2)", [(1.0, 2.0)]),
        ("[1, 2]", [(1.0, 2.0)]),
        ("(1, 2), (3, 4)", [(1.0, 2.0), (3.0, 4.0)]),
        ("[(1s, 2.5 seconds)]", [(1.0, 2.5)]),
        ("[(0:12, 1:20.5), (1, 2 min), (1:02:03, 1:02:04 s)]", [(12.0, 80.5), (60.0, 120.0), (3723.0, 3724.0)]),
        ("[(1 min 5 s,\n2 minutes)]", [(65.0, 120.0)]),
        ("[(1 min, 90)]", None),
        ("[(12, 20 frames)]", None),
        ("[(25%, 50%)]", None),
        ("[(1,5, 2,5)]", None),
        ("[(1, 2]]", None),
        ("[(-1, +2)]", [(-1.0, 2.0)]),
        ("[(\N{MINUS SIGN}1, 2)]", [(-1.0, 2.0)]),
        ("[(01, .5e)]", None),
        ("[(01, 2.)]", [(1.0, 2.0)]),
        ("[(3, 3)]", [(3.0, 3.0)]),
        ("[]", None),  # every question has evidence
        ("", None),
        ("[(2, 1)]", None),
        ("[(1, 2), (4, 3)]", None),
        ("[(1, 2)", None),
        ("(1, 2)]", None),
        ("[(1, 2]]", None),
        ("[(1, 2) (3, 4)]", None),
        ("[(1, 2),,(3, 4)]", None),
        ("[,(1, 2)]", None),
        ("[(1, 2, 3)]", None),
        ("[(1, nan)]", None),
        ("[(1, inf)]", None),
        ("[(1, 1e3)]", None),
        ("[(1, " + "9" * 400 + ")]", None),
        ("from (1, 2)", None),
        ("[(1, 2)] and more", None),
    ],
)
def test_the_tolerant_reader(text, intervals):
    assert read_glue(text) == intervals


def test_no_more_than_a_bounded_number_of_intervals():
    assert len(read_glue("[" + "(1, 2)," * MAX_INTERVALS + "]")) == MAX_INTERVALS
    assert read_glue("[" + "(1, 2)," * (MAX_INTERVALS + 1) + "]") is None
    assert len(read_paper_glue("[" + "(1, 2)," * 9000 + "]")) == 9000  # the original has no bound but the text's


def test_glue_text_is_read_by_both():
    assert glue_text([(13.8, 29.8), (30.0, 31.456)]) == "[(13.80, 29.80), (30.00, 31.46)]"
    for read in (read_glue, read_paper_glue):
        assert read(glue_text([(0.0, 0.5), (100.0, 200.25)])) == [(0.0, 0.5), (100.0, 200.25)]
    assert glue_text([]) == "[]"


BLOCKS = ("answer", "glue")


@pytest.mark.parametrize(
    ("text", "strict", "paper"),
    [
        ("<think>t</think><answer>A</answer><glue>[]</glue>", True, True),
        (" <think>t</think>\n<answer>A</answer>\t<glue>[]</glue>\n", True, True),
        ("<think></think><answer></answer><glue></glue>", True, True),
        ("<think>t</think><answer>A</answer> and <glue>[]</glue>", False, False),
        ("<think>t</think> so <answer>A</answer><glue>[]</glue>", False, False),
        ("<think>t</think><glue>[]</glue><answer>A</answer>", False, False),
        ("<think>t</think><answer>A</answer>", False, False),
        ("<answer>A</answer><glue>[]</glue>", False, False),
        ("<think>t</think><answer>A</answer><glue>[]</glue>.", False, False),
        ("<think>t</think><answer>A</answer><glue>[]", False, False),
        ("<think>t</think><answer>A</answer><glue></glue", False, False),
        ("<think>t</think><answer>A</answer><glue>a</glue><glue>b</glue>", False, True),
        ("<think><answer>x</answer>t</think><answer>A</answer><glue>b</glue>", False, True),
        ("<think>t</think>x</think><answer>A</answer><glue>b</glue>", False, True),
        ("<think>t</think><answer>A</answer>x</answer><glue>b</glue>", False, True),
        ("<think>t<answer>A</think></answer><glue>[]</glue>", False, False),
        ("<think>t</think><answer>A<glue></answer></glue>", False, False),
        ("</think><think><answer>A</answer><glue>[]</glue>", False, False),
    ],
)
def test_tags_in_order(text, strict, paper):
    assert has_strict_format(text, True, BLOCKS) is strict
    assert has_paper_format(text, True, BLOCKS) is paper


def test_tags_in_order_without_thinking():
    assert has_strict_format("<answer>A</answer> <glue>[]</glue>", False, BLOCKS)
    assert not has_strict_format("<think></think><answer>A</answer><glue>[]</glue>", False, BLOCKS)
    assert has_paper_format(" <answer>A</answer> <glue>[]</glue> ", False, BLOCKS)
    assert not has_paper_format("<think></think><answer>A</answer><glue>[]</glue>", False, BLOCKS)


def test_the_first_glue_block_anywhere_must_be_valid():
    assert has_paper_glue_format("<think></think><answer>A</answer><glue>[(1, 2)]</glue>", True)
    assert not has_paper_glue_format("<think></think><answer>A</answer><glue>[(2, 1)]</glue>", True)
    in_think = "<think><glue>{}</glue></think><answer>A</answer><glue>{}</glue>"
    assert has_paper_glue_format(in_think.format("[]", "no list"), True)
    assert not has_paper_glue_format(in_think.format("no list", "[]"), True)


@settings(max_examples=300)
@given(st.text(max_size=40) | st.text("[](),. -+0159s\n", max_size=30))
def test_any_text_gives_ordered_intervals_or_none(text):
    for read in (read_glue, read_paper_glue):
        for candidate in (text, f"[{text}]", f"[({text})]"):
            assert all(start <= end for start, end in read(candidate) or [])


@pytest.mark.parametrize(
    "piece",
    ["[", "(", "(1,", "(1, 2),", "[1, 2],", "1", "9.", " ", ",", "\n", "(1 ,", "-", "</think>", "</answer> ", "<glue>"],
)
def test_time_is_linear(piece):
    text = piece * (200_000 // len(piece))
    tags = "<think>" + text + "</think><answer>" + text + "</answer><glue>" + text
    start = time.process_time()
    for candidate in (text, "[" + text + "]", "[(" + text + ", 1)]", "[(1," + " " * 200_000 + "x"):
        read_glue(candidate)
        read_paper_glue(candidate)
    has_paper_glue_format(tags + "</glue>", True)
    has_paper_glue_format(tags, True)
    has_strict_format(tags, True, BLOCKS)
    assert time.process_time() - start < 1.0
