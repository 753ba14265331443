"""kill -9 at a random moment of a run; and at each operation on files, in the middle of a write if it is one."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults import file_operations
from tests.faults.runs import Started
from tests.faults.trials import Bench
from tests.faults.undisturbed import Runs, check_goes_on


def kill_at_a_moment(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant = rng.choice(runs.variants)
    folder = bench.empty_folder()
    seconds = rng.uniform(0.0, runs.undisturbed(variant).seconds)
    bench.fault = f"kill -9 of {variant} after {seconds:.2f} s"
    started = Started(runs.arguments(variant, folder / "run"), folder / "killed")
    time.sleep(seconds)
    started.kill().checked()
    _go_on(runs, variant, folder)


def kill_at_an_operation(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant = rng.choice(runs.variants)
    folder = bench.empty_folder()
    at = rng.randint(1, runs.undisturbed(variant).num_operations)
    bench.fault = f"kill -9 of {variant} at operation {at} on its files"

    def arm() -> None:
        file_operations.arm(folder / "run", at, file_operations.KILL)

    Started(runs.arguments(variant, folder / "run"), folder / "killed", arm).wait().checked()
    _go_on(runs, variant, folder)


def _go_on(runs: Runs, variant: str, folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)  # it may not have come so far
    check_goes_on(runs, variant, folder / "run", folder / "resumed")
