"""kill -9 of a video worker at random moments of a run, its start among them: the run's bits are the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tests.faults.runs import Started
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_same, what_is_left


def kill_workers(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder, pauses = bench.empty_folder(), [rng.uniform(0.0, 2.5) for _ in range(rng.choice([1, 1, 2]))]
    bench.fault = (
        f"kill -9 of the video worker, {' and '.join(f'{pause:.2f} s' for pause in pauses)} after it was there"
    )
    started = Started(runs.arguments("train", folder / "run", "--video.num_workers=1"), folder / "log")
    killed: set[int] = set()
    for pause in pauses:
        if not started.until(lambda: bool(_children(started.pid) - killed)):
            break
        time.sleep(pause)
        for child in _children(started.pid) - killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed.add(child)
    ended = started.wait().checked()
    if ended.code != 0:
        raise LostError(f"the run ended: {ended.refusal()}")
    check_same(what_is_left(folder / "run", ended), runs.undisturbed("train").left)
    path = folder / "run" / "quarantine.jsonl"
    if path.exists() and path.read_text().strip():
        raise LostError(f"a file is blamed: {path.read_text()[:200]}")


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found |= {int(child) for child in (thread / "children").read_text().split()}
    return found
