"""The compiled readers of answers equal the plain ones on every text, whatever its script, length and malice."""

import math
import sys
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.native.answer_grammar import SCRAPS, answers
from tests.native.fuzz_answers import differences, fuzz, main, readers
from tests.tasks.test_answer_format import WORST
from vcr1_fast import native
from vcr1_fast.tasks import answers_batch
from vcr1_fast.tasks.answer_format import MAX_TEXT_CHARS

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason() or "")

texts = st.one_of(st.lists(st.sampled_from(SCRAPS), max_size=30).map("".join), st.text(max_size=60))
numbers = st.text("0123456789.eE+-", max_size=12)


def test_twenty_thousand_generated_and_mutated_answers():
    """The million is `python -m tests.native.fuzz_answers`."""
    assert fuzz(20_000, seed=1) == []


def test_the_generator_reaches_every_reader():
    """Of 4,000 answers each reader accepts some and refuses some, so that an agreement says something."""
    generated = list(answers(2, 4000))
    for name, _, plain in readers():
        num_read = sum(value not in (None, False) for value in plain(generated))
        assert 4 <= num_read <= 3990, name


def test_a_difference_is_found_and_ends_the_program(monkeypatch, capsys):
    monkeypatch.setattr(answers_batch, "read_paper_choices_plain", lambda texts, tag, pick: [None] * len(texts))
    found = differences(["<answer>B\n</answer>", "none"])
    assert found == ["read_paper_choices: native 'B', plain None, text '<answer>B\\n</answer>'"]
    monkeypatch.setattr(sys, "argv", ["fuzz_answers", "--count", "600"])
    with pytest.raises(SystemExit, match="read_paper_choices: native"):
        main()
    assert "600 answers, seed 0" in capsys.readouterr().out


@settings(max_examples=500)
@given(st.lists(texts, max_size=4), st.booleans())
@example(
    ["1 to 2.5x", "1 to 2 s:", "1 to .5x", "1 s: to 2", "1. to 2.", "+1 to -2", "1 to 2\u017f", "1 \u017fec to 2"], True
)
@example(["[", "]", "[]", "[,]", "[[1,2,3,4],]", "[[00,0,-0,012]]", "[[1,2,3,4]]\v", "\v[]", "['\\", "['\\\n']"], True)
@example(
    ["[(1, 2)]\n", "[(1, 2)]\n\n", "[(9007199254740993, 9007199254740992.0)]", "[(1,2),]", "[(01,2)]", "[(0.5,00)]"],
    True,
)
@example([f"[({2**1024}, {2**1024}.0)]", f"[({2**1024}.5, {2**1024})]", f"[({2**1024}, {2**1024 - 1})]"], True)
@example([f"[({'9' * 4300}, {'9' * 4301})]", f"[({'9' * 4300}, {'9' * 4300})]", f"[(1, {'0' * 5000})]"], True)
@example(
    ["C", "c.", "(D)", "answer is: e", "the best choice is (b)", "A boy, so B", "A or B", "I see C", "C's", "x (B)"],
    True,
)
@example(
    ["A. two dogs", "b) Two  dogs!", "a red cat", "answer", "option A red cat", "A is", "A island B", "caf\u00c9"], True
)
@example(["The The answeranswer B", "Best answer: Best option:C", "Best answer:Best option:C", "\u00a0A"], True)
def test_any_text(batch, raw):
    assert differences(batch, raw) == []


@settings(max_examples=500)
@given(st.lists(numbers, min_size=4, max_size=4), st.floats(), st.integers(-350, 320))
def test_any_number(parts, value, exponent):
    lists = ["[[" + ",".join(parts) + "]]", f"[[{value!r},{value},{abs(value) if value == value else 0}e{exponent},1]]"]
    assert differences([*lists, f"{parts[0]} to {parts[1]}", f"({parts[2]},{parts[3]})"], raw=True) == []


LIMITS = """
    1.7976931348623157e308 1.7976931348623158e308 1.7976931348623159e308 1e309 4.9e-324 2.47e-324 1e-400 0e999999999999
    2.4703282292062327e-324 2.4703282292062328e-324 2.2250738585072011e-308 2.2250738585072014e-308 9007199254740993
    1e99999999999999999999 1e-99999999999999999999 9007199254740993.0000000000000000000000001
"""
ZEROS = "0" * 400
LONG = (
    "1" * 400,
    f"0.{ZEROS}1",
    f"{ZEROS}1.5",
    f"1{ZEROS}e-400",
    f"0.{ZEROS}1e401",
    "1" * 800 + "e-799",
    "." + "3" * 2000,
)


def test_numbers_at_the_limits_of_a_double_round_as_in_python():
    boxes = [f"<answer>[[{number},-{number},+{number},0]]</answer>" for number in (*LIMITS.split(), *LONG)]
    assert differences(boxes) == []
    assert answers_batch.read_box_lists(boxes[3:4], "fixed") == [[[math.inf, -math.inf, math.inf, 0.0]]]
    assert (
        math.copysign(1.0, answers_batch.read_box_lists(["<answer>[[-0,-1e-400,0,0]]</answer>"], "fixed")[0][0][1])
        == -1
    )


def test_every_character_has_pythons_class():
    """As blank, digit, word character and part of a unit. Every 61st code point and all that Python treats specially.

    All 1,114,112 take a minute and agree too (Python 3.11, Unicode 14).
    """
    every = map(chr, range(0x110000))
    batch = [
        shape.format(c)
        for c in every
        if ord(c) < 0x300 or ord(c) % 61 == 0 or c.isspace() or c.isdecimal() or c.casefold().isascii()
        for shape in ("<answer>{0} 1{0} to 2{0}</answer>{0}", "<answer>[[1,2,3,'{0}'{0}]]{0}</answer>")
    ]
    for rule in ("fixed", "paper"):
        assert_equal(batch, "read_periods", rule, "answer", "last")
        assert_equal(batch, "read_box_lists", rule, "answer", "last")
        assert_equal(batch, "have_format", rule, False, ("answer",))


def assert_equal(batch, name, *arguments):
    got, wanted = (getattr(answers_batch, f"{name}_{kind}")(batch, *arguments) for kind in ("native", "plain"))
    assert got == wanted


def test_only_the_first_64_ki_characters_count():
    block = "<answer>1 to 2</answer>"
    for filler in ("a", "\u4e2d"):
        fits = filler * (MAX_TEXT_CHARS - len(block)) + block
        assert answers_batch.read_periods([fits, filler + fits], "fixed") == [(1.0, 2.0), None]


@pytest.mark.parametrize("piece", [*WORST.values(), "(1,2),", "\u2003"])
def test_time_is_linear_in_the_text(piece):
    """Quadratic cost on 64 Ki characters would take seconds; 22 readers of 3 such texts take less than 0.05 s."""
    text = (piece * MAX_TEXT_CHARS)[: MAX_TEXT_CHARS - 40]
    batch = [f"<answer>{text}</answer>", f"<glue>[{text}]</glue>", f"<think>{text}<answer>[['{text[:60000]}</answer>"]
    began_s = time.process_time()
    for _, compiled, _ in readers():
        compiled(batch)
    assert time.process_time() - began_s < 2.0
    assert differences(batch) == []


def test_the_number_of_threads_does_not_change_anything():
    from vcr1_fast import _native

    generated, limit = 8 * list(answers(4, 2000)), _native.thread_limit()
    assert sum(min(len(text), MAX_TEXT_CHARS) for text in generated) > 4 * 2**20  # work for 4 threads
    try:
        results = []
        for threads in (1, 4):
            _native.set_thread_limit(threads)
            results.append([compiled(generated) for _, compiled, _ in readers()])
    finally:
        _native.set_thread_limit(limit)
    assert repr(results[0]) == repr(results[1])


def test_the_interpreter_runs_on_while_answers_are_read():
    batch, finished = ["<answer>" + "1 to " * 12_000 + "2</answer>"] * 300, []

    def read():
        answers_batch.read_periods_native(batch, "fixed", "answer", "last")
        finished.append(True)

    thread, interval_s = threading.Thread(target=read), sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    try:
        thread.start()
        was_finished = bool(finished)
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert finished and not was_finished


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a", 3], "answer", "last", "fixed"), TypeError, "texts: item 1 got int, wanted str"),
        ((["a"], "", "last", "fixed"), ValueError, "tag: value got '', wanted ASCII letters"),
        ((["a"], "a>", "last", "fixed"), ValueError, "tag: value got 'a>', wanted ASCII letters"),
        ((["a"], "answer", "second", "fixed"), ValueError, "pick: value got 'second', wanted 'first' or 'last'"),
        ((["a"], "answer", "last", "strict"), ValueError, "rule: value got 'strict', wanted 'fixed' or 'paper'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    from vcr1_fast import _native

    with pytest.raises(error, match=message):
        _native.read_periods(*arguments)
    with pytest.raises(ValueError, match="blocks: count got 0, wanted 1 or more"):
        _native.have_format([], [], "fixed")


def test_choices_beyond_ascii_are_left_to_python():
    from vcr1_fast import _native

    options, foreign = ("a cat", "a dog"), ("a cat", "caf\u00e9")
    texts = [
        "\u4e2d<answer>A dog</answer>",
        "<answer>B \u2019</answer>",
        "<answer>CAF\u00c9</answer>",
        "<answer>a</answer>",
    ]
    letters, left = _native.read_choices(texts, [options, options, foreign, foreign], "answer", "last")
    assert (letters, left) == (
        ["B", None, None, None],
        [1, 2, 3],
    )  # a block beyond ASCII counts, a think block does not
    assert answers_batch.read_choices(texts, [options, options, foreign, foreign]) == ["B", "B", "B", "A"]
    with pytest.raises(ValueError, match="got 4 texts and 1 lists of options, wanted one list per text"):
        answers_batch.read_choices(texts, [options])
    with pytest.raises(ValueError, match="options: count got 1, wanted 4"):
        _native.read_choices(texts, [options], "answer", "last")
    with pytest.raises(TypeError, match="options: item got int, wanted str"):
        _native.read_choices(["a"], [(1,)], "answer", "last")


def test_no_text_leaks():
    text = "<answer>" + "1 to 2" + "\u4e2d</answer>"
    count = sys.getrefcount(text)
    for _ in range(200):
        answers_batch.read_periods_native([text] * 3, "fixed", "answer", "last")
        with pytest.raises(TypeError):
            answers_batch.read_periods_native([text, None], "fixed", "answer", "last")
    assert sys.getrefcount(text) == count


def test_the_batch_functions_use_the_compiled_module():
    assert answers_batch._read_periods is answers_batch.read_periods_native
    assert answers_batch._have_format is answers_batch.have_format_native
    assert answers_batch.read_paper_choices(("<answer>C</answer>", "")) == ["C", None]
    assert answers_batch.have_format(("<answer>C</answer>", ""), "fixed", think=False) == [True, False]
    assert answers_batch.read_glues(("<glue>[(1, 2)]</glue>",), "fixed") == [[(1.0, 2.0)]]
