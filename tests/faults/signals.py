"""Signals at a random moment: the run saves and ends with 128 + n, or it is killed before it has done anything."""

from __future__ import annotations

import random
import re
import signal
import time

from tests.faults.runs import Started
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_goes_on, check_same, what_is_left

SENT = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def send_a_signal(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant, folder = rng.choice(runs.variants), bench.empty_folder()
    name = rng.choice(SENT)
    seconds = rng.uniform(0.0, runs.undisturbed(variant).seconds)
    pause_s = rng.choice([None, None, None, rng.uniform(0.0, 0.3)])
    bench.fault = (
        f"{name}{'' if pause_s is None else f' twice, {pause_s:.2f} s apart'} to {variant} after {seconds:.2f} s"
    )
    # a checkpoint each second step alone, so that stopping must save one
    arguments = runs.arguments(variant, folder / "run", "--checkpoint.every=2")
    started = Started(arguments, folder / "stopped")
    time.sleep(seconds)
    number = getattr(signal, name)
    started.send(number)
    if pause_s is not None:
        time.sleep(pause_s)
        started.send(number)
    ended = started.wait()
    steps = [int(step) for step in re.findall(r"^step (\d+)/", ended.out, flags=re.MULTILINE)]
    done = max(steps, default=0)
    if ended.code == -number:
        pass  # before the first step, or after the last: what was done must be saved, see below
    elif ended.checked().code not in (0, 0x80 + number):
        raise LostError(f"exit code {ended.code}, wanted {0x80 + number}: {ended.err[-200:]!r}")
    if ended.code == 0:
        check_same(what_is_left(folder / "run", ended), runs.undisturbed(variant).left)
        return
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    saved = done if pause_s is None else done // 2 * 2  # the second one ends it at once
    check_goes_on(runs, variant, folder / "run", folder / "resumed", at_least=saved)
