"""`python -m tests.native.fuzz_atheris CORPUS [-max_total_time=600 ...]`: the readers under libFuzzer.

Needs `pip install atheris` (not among the test requirements). Coverage of the plain readers guides the mutations, and
every input goes through the compiled readers too: a difference, an exception or a hang ends the run with the input in a
file. CORPUS is a folder; an empty one is filled with generated answers first. Options are libFuzzer's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from tests.native.answer_grammar import SCRAPS, answers

with atheris.instrument_imports(include=["vcr1_fast.tasks"]):
    from tests.native.fuzz_answers import differences

NUM_SEEDS = 300


def check_one(data: bytes) -> None:
    """One input: UTF-8, with broken sequences as U+FFFD."""
    found = differences([data.decode("utf-8", "replace")])
    if found:
        raise AssertionError("\n".join(found))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for i, text in enumerate(answers(0, NUM_SEEDS)):
            (corpus / f"seed{i}").write_bytes(text.encode("utf-8", "replace")[:4096])
    words = corpus.parent / f"{corpus.name}.dict"
    quoted = ["".join(f"\\x{byte:02x}" for byte in scrap.encode("utf-8", "replace")) for scrap in SCRAPS]
    words.write_text("\n".join(f'"{word}"' for word in quoted), encoding="utf-8")
    atheris.Setup([*sys.argv, f"-dict={words}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"], check_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
