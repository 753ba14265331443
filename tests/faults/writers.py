"""The process that writes checkpoints beside the steps: killed, or stopped when the run itself is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.faults.runs import Started
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_goes_on, check_same, what_is_left

GONE_S = 5.0  # a killed process may take a moment to go


def disturb_the_writer(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant, folder = rng.choice(runs.variants), bench.empty_folder()
    seconds, is_killed = rng.uniform(0.3, runs.undisturbed(variant).seconds), rng.random() < 0.5
    pause_s = rng.uniform(0.0, 0.5)
    what = "is killed" if is_killed else f"is stopped, and the run killed {pause_s:.2f} s later"
    bench.fault = f"the writer of {variant} {what}, {seconds:.2f} s after its start"
    started = Started(runs.arguments(variant, folder / "run", "--checkpoint.asynchronous=true"), folder / "disturbed")
    started.until(lambda: bool(_writers_of(started.pid)))
    time.sleep(seconds * rng.random())
    writers = _writers_of(started.pid)
    for writer in writers:
        os.kill(writer, signal.SIGKILL if is_killed else signal.SIGSTOP)
    if not is_killed:
        time.sleep(pause_s)
        started.kill()
    ended = started.wait().checked()
    for writer in writers:
        if not _ends_with_its_run(writer):  # it was stopped in its first moment: it must see that it is alone, and end
            os.kill(writer, signal.SIGCONT)
    until = time.monotonic() + GONE_S
    while left := [writer for writer in writers if _is_alive(writer)]:
        if time.monotonic() > until:
            raise LostError(f"its writer {left[0]} lives on")
        time.sleep(0.01)
    if ended.code == 0:  # it had nothing to write any more
        check_same(what_is_left(folder / "run", ended), runs.undisturbed(variant).left)
        return
    if is_killed and "ended with signal 9" not in ended.refusal():
        raise LostError(f"the death of the writer was told as: {ended.refusal()}")
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    check_goes_on(runs, variant, folder / "run", folder / "resumed")


def _writers_of(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if _field(pid, 1) == str(parent) and b"checkpoint_writer" in _command(pid)]


def _is_alive(pid: int) -> bool:
    return _field(pid, 0) not in ("", "Z", "X")


def _ends_with_its_run(pid: int) -> bool:
    """Whether the kernel has been asked to end it, which loader_worker.end_with does just before it sets the score; or
    it is gone."""
    try:
        return Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    except OSError:
        return True


def _field(pid: int, number: int) -> str:
    """Of /proc/PID/stat after the name: 0 the state, 1 the parent; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number]
    except OSError:
        return ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
