"""Letters out of answers: the careful reader against the traps, the original's against its own quirks."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.tasks.choice_format import marked_options, most_common, read_choice, read_paper_choice

OPTIONS = ("share with the girl", "approach the lady", "unwrap it", "play with a toy train", "gesture something")


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "c",
        " C\n",
        "(C)",
        "( C )",
        "[c]",
        "C.",
        "**C**",
        "C) unwrap it",
        "C. Unwrap it.",
        "(C) unwrap  it",
        "C: unwrap it",
        "C - unwrap it",
        "c) unwrap it",
        "C unwrap it",
        "C) he opens the present",
        "Answer: C",
        "Answer: (C)",
        "answer: c",
        "The answer is (C)",
        "the answer is C.",
        "The correct answer is C",
        "**Answer:** C",
        "Option C",
        "option c.",
        "The best option is C, as he opens the box",
        "unwrap it",
        "Unwrap it.",
        '"unwrap it"',
        "The answer is unwrap it",
        "Because he opens the box: C",
        "A boy opens the box, so it is C",
        "I think it is C",
        "It is C. C is the only one that fits.",
        "\\boxed{C}",
    ],
)
def test_the_letter_is_read(text):
    assert read_choice(text, OPTIONS) == "C"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Because the boy opens the box",
        "A boy opens the box",
        "Dad gives it to Eve",
        "C or D",
        "A and B",
        "C, D",
        "(A) (B)",
        "A, not C",
        "F",
        "(F)",
        "Z) unwrap it",
        "The answer is H",
        "C H",
        "B) unwrap it",  # the letter of one option, the text of another
        "he unwraps it",
        "C's",
        "T-shirt",
        "vitamin-C",
        "boy(s)",
        "3",
        "ABCDE",
        "\N{FULLWIDTH LATIN CAPITAL LETTER C}",
        "\N{LATIN SMALL LIGATURE ST}",
    ],
)
def test_no_letter_or_several(text):
    assert read_choice(text, OPTIONS) is None


def test_letters_end_with_the_options():
    assert read_choice("B", ("yes", "no")) == "B"
    assert read_choice("C", ("yes", "no")) is None
    assert read_choice("yes", ("yes", "no")) == "A"
    assert read_choice("J", tuple("0123456789")) == "J"
    assert read_choice("3", tuple("0123456789")) == "D"


def test_texts_that_look_like_letters_or_lead_ins():
    teams = ("Team B", "Team A", "option 1", "option 2")
    assert read_choice("Team A", teams) == "B"
    assert read_choice("B) Team A", teams) == "B"
    assert read_choice("A) Team A", teams) is None
    assert read_choice("option 2", teams) == "D"
    assert read_choice("C", ("C", "B", "A")) == "C"  # the letter goes before the text, with and without lead-in
    assert read_choice("the answer is C", ("C", "B", "A")) == "C"
    twice = ("scarf", "cap", "scarf")  # as in one row of NExT-GQA
    assert read_choice("scarf", twice) is None
    assert read_choice("(C) scarf", twice) == "C"
    assert read_choice("A scarf", ("scarf", "cap")) == "A"
    assert read_choice("A cap", ("scarf", "cap")) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C)", "C"),
        (" C ", "C"),
        ("c", None),
        ("", None),
        ("H", None),
        ("Because he opens it", "B"),
        ("A boy opens it, so C", "A"),
        ("Dad", "D"),
        ("xyzG", "G"),
        ("C or D", "C"),
        ("D or C", "D"),
        ("The answer is C", "C"),
        ("The best answer is C", "C"),
        ("The correct option is (E) gesture", "E"),
        ("Answer: C", "A"),  # not one of the stock phrases
        ("Best answer: C", "B"),  # the missing comma: only the two phrases in a row are taken out
        ("Best option: C", "B"),
        ("Best answer:Best option: C", "C"),
        ("Best answer: Best option: C", "B"),
        ("BestThe answer answer:Best option: C", "C"),  # phrases go one after the other, and what closes up counts
        ("the word " * 11, None),
    ],
)
def test_the_original_takes_the_first_capital(text, letter):
    assert read_paper_choice(text) == letter


def test_options_are_listed_with_their_letters():
    assert marked_options(["a cat", "a dog"]) == ["(A) a cat", "(B) a dog"]


def test_most_common_value():
    assert most_common(["B", "A", "B"]) == "B"
    assert most_common(["C", "B", "B", "C", "A"]) == "B"  # the alphabetically first of equals
    assert most_common([]) == ""


@settings(max_examples=300)
@given(
    st.text(max_size=40) | st.text("ABCcae ().,:'-", max_size=20),
    st.lists(st.text(max_size=8), min_size=2, max_size=26),
)
def test_any_text_gives_a_letter_of_the_options_or_none(text, options):
    letter = read_choice(text, options)
    assert letter is None or "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(letter) < len(options)
    assert read_paper_choice(text) in {None, *"ABCDEFG"}


@pytest.mark.parametrize(
    "piece",
    ["A ", "(", "( ", "answer is ", "the ", " ", "C.,:", "A and ", "''", "Best answer:", "[A ", "A) ", "-", "aA"],
)
def test_time_is_linear(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    read_choice(text, OPTIONS)
    read_paper_choice(text.lower())  # without a capital to stop at
    assert time.process_time() - start < 1.0
