"""Two ranks, one of which is killed, has a full disk, or gets a signal; torchrun then ends the other. The next start
goes on to the same bits."""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import file_operations
from tests.faults.runs import Ended, Started
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import (
    Left,
    Runs,
    check_same,
    resumed_step,
    steps_with_checkpoints,
    what_is_left,
)
from tests.tiny_policy import free_port

NUM_RANKS = 2
GRACE_S = 2.0  # torchrun's is 30: the others end by themselves, or are killed
Before = Callable[[], None]


def disturb_one_rank(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder, name = bench.empty_folder(), rng.choice(["kill", "operation", "ENOSPC", "SIGTERM", "SIGUSR1"])
    left, seconds = _undisturbed(runs)
    num_operations = runs.undisturbed("train").num_operations  # of one process; the first of two has as many
    rank, at, moment = rng.randrange(NUM_RANKS), rng.randint(1, num_operations), rng.uniform(0.0, seconds)
    is_timed = name not in ("operation", "ENOSPC")
    bench.fault = f"{name} of rank {rank} of {NUM_RANKS}, {f'{moment:.2f} s' if is_timed else f'its operation {at}'}"

    def arm() -> None:
        if name == "operation":
            file_operations.arm(folder / "run", at, file_operations.KILL)
        elif name == "ENOSPC":
            file_operations.arm(folder / "run", at, file_operations.FAIL_FROM, errno.ENOSPC)

    started = _start(runs, folder, "disturbed", {rank: arm})
    if is_timed:
        time.sleep(moment)
        started[rank].send(signal.SIGKILL if name == "kill" else getattr(signal, name))
    for ended in _end_as_torchrun(started):
        ended.checked(0 if name not in ("SIGTERM", "SIGUSR1") else getattr(signal, name))
    saved = max(steps_with_checkpoints(folder / "run"), default=0)
    ends = [one.wait() for one in _start(runs, folder, "resumed", {})]
    for ended in ends:
        if ended.checked().code != 0:
            raise LostError(f"the run cannot be resumed: {ended.err[-300:]!r}")
    if resumed_step(ends[0]) < saved:
        raise LostError(f"it went on from step {resumed_step(ends[0])}, though step {saved} was saved")
    check_same(what_is_left(folder / "run", ends[0]), left)


def _start(runs: Runs, folder: Path, name: str, before: dict[int, Before]) -> list[Started]:
    port = free_port()

    def set_up(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if rank in before:
            before[rank]()

    arguments = runs.arguments("train", folder / "run")
    return [Started(arguments, folder / f"{name}_{rank}", functools.partial(set_up, rank)) for rank in range(NUM_RANKS)]


def _end_as_torchrun(started: list[Started]) -> list[Ended]:
    """When one has ended with an error, the others get a while, then SIGKILL."""
    end = None
    while any(one.poll() is None for one in started):
        if end is None and any(one.poll() not in (None, 0) for one in started):
            end = time.monotonic() + GRACE_S
        if end is not None and time.monotonic() > end:
            for one in started:
                one.kill()
        time.sleep(0.005)
    return [one.wait() for one in started]


@functools.cache
def _undisturbed(runs: Runs) -> tuple[Left, float]:
    folder = runs.folder / "undisturbed" / "ranks"
    folder.mkdir(parents=True)
    began = time.monotonic()
    ends = [one.wait() for one in _start(runs, folder, "log", {})]
    if any(ended.code for ended in ends):
        raise RuntimeError(f"the undisturbed run of two ranks failed: {ends[0].err[-2000:]} {ends[1].err[-2000:]}")
    return what_is_left(folder / "run", ends[0]), time.monotonic() - began
