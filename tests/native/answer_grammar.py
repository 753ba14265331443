"""Random answers for fuzzing the readers: well-formed ones from a grammar, and mutations of them. Seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

# What a mutation inserts: marks and words that mean something to a reader, and characters whose class differs between
# ASCII and Unicode (digits, blanks, a minus sign, a long s, a lone surrogate).
WORDS = r"""
    <think> </think> <answer> </answer> <glue> </glue> < > / to and TO And s sec secs seconds second S 1 0 9 00 012 1.5
    .5 5. 1e5 1E-400 1e999 -0 +7 - + . : , ( ) [ ] [[ ]] ' " \ True False None nan inf x _ A C (B) A. option answer Best
    m min MIN mins minutes 0:12 1:02:03.5 :05 % frames hours h percent in the 1m30s
"""
SCRAPS = [
    *WORDS.split(), " ", "  ", "\n", "\t", "\r", "\f", "\v", "\x1c", "\x85", "\u00a0", "\u2003", "\u200b", "\ufeff",
    "\x00", "\x7f", " to ", " and ", ", ", "The answer is ", "The best answer is", "Best answer:Best option:", "\\\n",
    "\\'", "\u0663", "\uff15", "\u00b2", "\u2212", "\u017f", "\u212a", "\u00e9", "\u4e2d", "\u2019", "\U0001d7d8",
    "\U0001f600", "\ud800",
]  # fmt: skip
BLANKS = ("",) * 24 + (" ", "\n", "  ", " ", "\n\n", "\t", "\u00a0")
UNITS = ("",) * 9 + ("s", " s", " sec", " seconds", "S", "\u017f", " secs.", " min", "m", " frames", "%", "\nminutes")
UNITS += (" min 7 s", "m5.5s", " minute and 59 seconds", ", 30 s", " in it", ") of", ") frames", ",5", "/3")
LEADS = ("",) * 3 + ("From ", "1 to 2, no: ", "(", "frames ", "1 hour, ", "2 minutes and ", "minutesand\n", "7,", "7/")
# Pieces of times, of which any order may come.
TIME_WORDS = "0 7 30 60 1.5 . : :05 :59 0:12 , and s sec m min minutes h frame % - + / ) in the x \u0663 \u4e2d"
TIMES = [*TIME_WORDS.split(), " ", " ", "\n", " to ", " to ", " and "]


def number(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.12:
        clock = [f"{rng.randrange(70):02d}" for _ in range(rng.choice((2, 2, 2, 3, 4)))]
        return ":".join(clock) + rng.choice(("", "", ".5", ".", "s", " min", ":"))
    if kind < 0.6:
        return f"{rng.uniform(0, 200):.{rng.randrange(4)}f}"
    if kind < 0.7:
        return str(rng.randrange(100))
    if kind < 0.8:
        return repr(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-20, 20))
    if kind < 0.87:
        return "".join(rng.choices("0123456789", k=rng.randrange(1, 25)))
    if kind < 0.92:
        return "".join(rng.choices("0123456789.eE+-", k=rng.randrange(1, 12)))
    if kind < 0.96:
        return f"{rng.randrange(10**18)}e{rng.randrange(-345, 320)}"
    return rng.choice(("-", "+", "")) + rng.choice(("0", "00", "1.", ".5", "9" * 320, "0." + "0" * 330 + "1", "7e-324"))


def period(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return "".join(rng.choices(TIMES, k=rng.randrange(3, 16)))
    joint = rng.choice((" to ", " to ", " and ", "to", " TO ", "  to ", " To\n"))
    end = rng.choice(("", "", ".", "x", ":"))
    return f"{rng.choice(LEADS)}{number(rng)}{rng.choice(UNITS)}{joint}{number(rng)}{rng.choice(UNITS)}{end}"


def boxes(rng: random.Random) -> str:
    def value() -> str:
        odd = rng.random()
        if odd < 0.9:
            return f"{rng.random():.{rng.randrange(1, 4)}f}"
        return number(rng) if odd < 0.96 else rng.choice(("None", "True", "'a'", '"b\\""', "[1, [2]]", "x"))

    def row() -> str:
        width = 4 if rng.random() < 0.97 else rng.randrange(6)
        return "[" + rng.choice((",", ", ", ",\n")).join(value() for _ in range(width)) + rng.choice(("]", "]", ",]"))

    return (
        "["
        + rng.choice((",", ", ", ",\n ")).join(row() for _ in range(rng.randrange(10)))
        + rng.choice(("]", "]", ", ]"))
    )


def glue(rng: random.Random) -> str:
    def pair() -> str:
        start, end = sorted((rng.uniform(0, 90), rng.uniform(0, 90)))
        left, right = (f"{start:.1f}", f"{end:.1f}") if rng.random() < 0.85 else (number(rng), number(rng))
        if rng.random() < 0.06:  # exact integers beside doubles
            big = rng.choice((2**53, 10**22, 2**100, 10**308, 2**1024)) + rng.randrange(-2, 3)
            left, right = rng.choice(((str(big), str(big + 1)), (str(big), f"{big}.0"), (f"{big}.5", str(big))))
        unit = rng.choice(UNITS) if rng.random() < 0.2 else ""
        shape = rng.choice(("({}{},{}{}{})",) * 6 + ("[{}{},{}{}{}]", "( {}{} ,{}{}{} )"))
        return shape.format(left, unit, rng.choice(BLANKS), right, unit)

    body = rng.choice((", ", ",", ",\n")).join(pair() for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 70))))
    return rng.choice(("[{}]", "[{}]", "[{}]", "{}", "[ {} ]", "[{},]")).format(body) + rng.choice(("", "", "", "\n"))


def choice(rng: random.Random) -> str:
    letter = rng.choice("ABCDEFabcdeIZ")
    return rng.choice(
        ("{}", "({})", "{}.", "{}) a red cat", "The answer is {}", "Because {}", "Best answer: {}", "answer: ({})",
         "The correct option is {}.", "a red cat", "{} - two dogs", "{} boy runs, so {}", "Option {} and B",
         "{}\u2019s", "[ {} ] or ({})", "My final answer : {}", "{} and {}", "{}: two dogs!", "*{}*",
         "I said {}, not {}", "the right choice is two dogs", "{}-{}", "{}", "X", "(1.5)", "it's {}'s", "A: {}")
    ).format(letter, rng.choice("ABC"))  # fmt: skip


def answer(rng: random.Random) -> str:
    """A completion that a model might give."""
    kinds: tuple[Callable[[random.Random], str], ...] = (period, boxes, glue, choice)
    think = rng.choice(("", "<think>a man opens a door at 3.5</think>", "<think>x\n\u4e2d 1 to 2</think>\n"))
    text = think + rng.choice(BLANKS) + f"<answer>{rng.choice(BLANKS)}{rng.choice(kinds)(rng)}</answer>"
    if rng.random() < 0.5:
        text += rng.choice(BLANKS) + f"<glue>{rng.choice((glue, glue, glue, glue, period, boxes))(rng)}</glue>"
    if rng.random() < 0.1:
        text += f"<answer>{rng.choice(kinds)(rng)}</answer>"
    return text


def mutated(rng: random.Random, text: str) -> str:
    """One to six cuts, copies, swaps, insertions or replacements of characters."""
    for _ in range(rng.randrange(1, 7)):
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:i] + rng.choice(SCRAPS) + text[i:]
        elif kind == 1:
            text = text[:i] + text[min(j, i + 8) :]
        elif kind == 2:
            text = text[:i] + text[i : i + 20] * rng.randrange(2, 4) + text[i + 20 :]
        elif kind == 3:
            text = text[:i] + rng.choice(SCRAPS) + text[i + 1 :]
        elif kind == 4:
            text = (
                text[:i]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))))
                + text[i:]
            )
        else:
            text = text[j:] + text[:i] if rng.random() < 0.2 else text[:i] + text[i + 1 :]
    return text


def soup(rng: random.Random) -> str:
    return "".join(rng.choices(SCRAPS, k=rng.randrange(40)))


def answers(seed: int, count: int) -> Iterator[str]:
    """`count` texts: 30% as a model writes them, 60% mutated, 9.9% soup, 0.1% longer than a reader reads."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:
            yield answer(rng)
        elif kind < 0.9:
            yield mutated(rng, answer(rng))
        elif kind < 0.999:
            yield rng.choice(("", "<answer>", "<answer>[[")) + soup(rng) + rng.choice(("", "</answer>"))
        else:
            yield (answer(rng) + rng.choice(SCRAPS) * rng.randrange(3000)) * rng.randrange(1, 40)
