"""`python -m tests.native.fuzz_answers --count 1000000`: every answer through the compiled readers and the plain ones.

Ends with status 1 and the text (as Python's ascii() writes it) at the first difference.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from tests.native.answer_grammar import answers
from vcr1_fast.tasks import answers_batch as batch

BATCH = 500
# What the letters of an answer stand for; the grammar writes some of these texts out.
OPTIONS = (
    ("a red cat", "Two dogs.", "the option", "A", "a  red cat"),
    ("A red cat", "two dogs", "caf\u00e9"),
    tuple(str(n) for n in range(30)),
    ("two dogs", "(B)", "", "answer", "1.5"),
)
Reader = Callable[[Sequence[str]], list[object]]


def readers() -> Iterator[tuple[str, Reader, Reader]]:
    """Name, compiled reader, plain reader."""
    for rule in ("fixed", "paper"):
        for tag, pick in (("answer", "last"), ("glue", "first")):
            for name in ("read_periods", "read_glues", "read_box_lists"):
                native, plain = (getattr(batch, f"{name}_{kind}") for kind in ("native", "plain"))
                yield (
                    f"{name} {rule} {tag} {pick}",
                    lambda texts, f=native, r=rule, t=tag, p=pick: f(texts, r, t, p),
                    lambda texts, f=plain, r=rule, t=tag, p=pick: f(texts, r, t, p),
                )
        for think in (True, False):
            for blocks in (("answer",), ("answer", "glue")):
                yield (
                    f"have_format {rule} {think} {blocks}",
                    lambda texts, r=rule, h=think, b=blocks: batch.have_format_native(texts, r, h, b),
                    lambda texts, r=rule, h=think, b=blocks: batch.have_format_plain(texts, r, h, b),
                )
    yield (
        "read_choices",
        lambda texts: batch.read_choices_native(texts, [OPTIONS[len(text) % 4] for text in texts], "answer", "last"),
        lambda texts: batch.read_choices_plain(texts, [OPTIONS[len(text) % 4] for text in texts], "answer", "last"),
    )
    yield (
        "read_paper_choices",
        lambda texts: batch.read_paper_choices_native(texts, "answer", "first"),
        lambda texts: batch.read_paper_choices_plain(texts, "answer", "first"),
    )


def differences(texts: Sequence[str], raw: bool = False) -> list[str]:
    """One line for each reader and text where the two disagree; repr tells -0.0 and every bit of a float apart.

    raw: each text is the inside of an answer block.
    """
    if raw:
        texts = [f"<answer>{text}</answer>" for text in texts]
    found: list[str] = []
    for name, native, plain in readers():
        got, wanted = native(texts), plain(texts)
        if repr(got) == repr(wanted):
            continue
        found += [
            f"{name}: native {g!r:.200}, plain {w!r:.200}, text {text!a}"
            for text, g, w in zip(texts, got, wanted, strict=True)
            if repr(g) != repr(w)
        ]
    return found


def fuzz(count: int, seed: int) -> list[str]:
    """Differences on `count` answers, at most those of one batch; empty when there are none."""
    texts = answers(seed, count)
    while part := list(islice(texts, BATCH)):
        found = differences(part)
        if found:
            return found
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began_s = time.monotonic()
    found = fuzz(arguments.count, arguments.seed)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.count} answers, seed {arguments.seed}, {time.monotonic() - began_s:.0f} s, peak {peak_mib:.0f} MiB"
    )
    if found:
        sys.exit("\n".join(found[:20]))
    print("no difference")


if __name__ == "__main__":
    main()
