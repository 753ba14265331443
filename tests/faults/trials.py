"""One fault, its judgement, and the table of all of them.

A trial is a function `trial(bench, rng)` that does one fault to the product and returns when nothing was lost. It
raises LostError for a run that cannot go on, other bits, or a wrong number that nobody was told of, and CrashedError
for a traceback or a crash. All that is random comes from `rng`, which follows from seed, kind and number of the trial.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

OUTCOMES = ("survived", "lost", "traceback")


class LostError(Exception):
    """What is lost or wrong, in words."""


class CrashedError(Exception):
    """The last line of the traceback, or how the process crashed."""


@dataclass
class Bench:
    """What trials share: a folder of their own, and what an undisturbed run left (see undisturbed.py)."""

    folder: Path
    fault: str = ""  # the fault of the trial in progress, in words

    def empty_folder(self) -> Path:
        """For the trial in progress; the one before it is gone."""
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


Trial = Callable[[Bench, random.Random], None]


@dataclass(frozen=True)
class Judged:
    kind: str
    number: int
    outcome: str
    fault: str
    cause: str
    seconds: float


@dataclass
class Tally:
    """What was tried of one kind."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def judged(kind: str, trial: Trial, bench: Bench, seed: int, number: int) -> Judged:
    """Run one trial. What the trial itself does wrong counts as lost: a judge that fails has judged nothing."""
    began, bench.fault = time.monotonic(), ""
    outcome, cause = "survived", ""
    try:
        trial(bench, random.Random(f"{seed} {kind} {number}"))
    except LostError as error:
        outcome, cause = "lost", str(error)
    except CrashedError as error:
        outcome, cause = "traceback", str(error)
    except Exception as error:
        traceback.print_exc()
        outcome, cause = "lost", f"the trial itself failed: {type(error).__name__}: {error}"
    return Judged(kind, number, outcome, bench.fault, cause, time.monotonic() - began)


def run_trials(
    kinds: Mapping[str, Trial],
    bench: Bench,
    seed: int,
    *,
    limit_s: float = float("inf"),
    counts: Mapping[str, int] | None = None,
    only_number: int | None = None,
) -> tuple[dict[str, Tally], list[Judged]]:
    """Trials of all kinds, each kind the same time, until `limit_s` or the `counts` of trials are over, or Ctrl-C."""
    tallies, failures = {kind: Tally() for kind in kinds}, []
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        open_kinds = [kind for kind, tally in tallies.items() if counts is None or tally.tried < counts[kind]]
        if not open_kinds:
            break
        kind = min(open_kinds, key=lambda name: tallies[name].seconds)
        number = tallies[kind].tried if only_number is None else only_number
        try:
            result = judged(kind, kinds[kind], bench, seed, number)
        except KeyboardInterrupt:
            break
        tallies[kind].counts[result.outcome] += 1
        tallies[kind].seconds += result.seconds
        if result.outcome != "survived":
            failures.append(result)
            print(failure_line(result, seed), flush=True)
    return tallies, failures


def failure_line(result: Judged, seed: int) -> str:
    again = f"python -m tests.faults --only {result.kind} --seed {seed} --trial {result.number}"
    return f"{result.outcome}: {result.kind}: {result.fault}: {result.cause[:400]}\n    again: {again}"


def table(tallies: Mapping[str, Tally]) -> str:
    rows = [("kind", "tried", *OUTCOMES, "s each")]
    total = Tally()
    for kind, tally in tallies.items():
        rows.append(_row(kind, tally))
        total.seconds += tally.seconds
        for outcome, count in tally.counts.items():
            total.counts[outcome] += count
    rows.append(_row("all", total))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def _row(kind: str, tally: Tally) -> tuple[str, ...]:
    each = tally.seconds / tally.tried if tally.tried else 0.0
    return (kind, str(tally.tried), *(str(tally.counts[outcome]) for outcome in OUTCOMES), f"{each:.2f}")


def write_report(path: Path, tallies: Mapping[str, Tally], failures: Sequence[Judged], **facts: object) -> None:
    kinds = {kind: {"tried": tally.tried, **tally.counts, "seconds": tally.seconds} for kind, tally in tallies.items()}
    report = {**facts, "kinds": kinds, "failures": [asdict(failure) for failure in failures]}
    path.write_text(json.dumps(report, indent=2) + "\n")
