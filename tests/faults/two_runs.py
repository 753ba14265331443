"""A second run in the folder of one that is alive, or stopped: one of them ends with one line, the other one's bits
are those of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time

from tests.faults.runs import Started
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_goes_on, check_same, what_is_left


def start_a_second_run(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant, folder = rng.choice(runs.variants), bench.empty_folder()
    seconds, is_stopped = rng.uniform(0.0, runs.undisturbed(variant).seconds), rng.random() < 0.4
    bench.fault = f"a second {variant} after {seconds:.2f} s{', the first one stopped meanwhile' * is_stopped}"
    arguments = runs.arguments(variant, folder / "run")
    first = Started(arguments, folder / "first")
    time.sleep(seconds)
    if is_stopped:
        first.send(signal.SIGSTOP)
    second = Started(arguments, folder / "second")
    try:
        if is_stopped:
            second.wait()
        first.send(signal.SIGCONT)
        ends = [first.wait().checked(), second.wait().checked()]
    finally:
        first.kill()
        second.kill()
    good = [ended for ended in ends if ended.code == 0]
    if not good:
        raise LostError(f"both ended: {ends[0].refusal()} / {ends[1].refusal()}")
    if len(good) == 2 and not any("resumed from" in ended.out for ended in ends):  # whichever had the lock first
        raise LostError("both ended with 0")
    if len(good) == 1:
        next(ended for ended in ends if ended.code != 0).refusal()
        check_same(what_is_left(folder / "run", good[0]), runs.undisturbed(variant).left)
    else:
        check_goes_on(runs, variant, folder / "run", folder / "third")
