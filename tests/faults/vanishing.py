"""A folder that is renamed away at a random moment of a run, and is there again when the run is started anew."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

from tests.faults.runs import Started, run
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, check_goes_on
from vcr1_fast.video.quarantine import PASSING, read_list, reason_class

OWN = ("run", "run/checkpoints", "run/tensorboard", "newest")


def take_a_folder_away(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant, folder = rng.choice(runs.variants), bench.empty_folder()
    what = rng.choice([*OWN, "data", "data/videos"])
    seconds = rng.uniform(0.1, runs.undisturbed(variant).seconds)
    bench.fault = f"{what} of {variant} vanishes after {seconds:.2f} s"
    data = shutil.copytree(runs.data, folder / "data") if what.startswith("data") else runs.data
    started = Started(runs.arguments(variant, folder / "run", data=data), folder / "disturbed")
    time.sleep(seconds)
    away = folder / "away"
    victim = _victim(folder, what)
    try:
        os.rename(victim, away)
    except OSError:
        bench.fault += " (it was not there yet)"
        away = None
    ended = started.wait().checked()
    if away is not None:
        if victim.exists():  # made anew by the run
            os.rename(victim, folder / "made_anew")
        victim.parent.mkdir(parents=True, exist_ok=True)
        os.rename(away, victim)
    if ended.code != 0:
        ended.refusal()
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    if what.startswith("data"):
        _check_data_is_used_again(runs, variant, folder, data)
    else:
        check_goes_on(runs, variant, folder / "run", folder / "resumed")


def _victim(folder: Path, what: str) -> Path:
    if what != "newest":
        return folder / what
    return max((folder / "run" / "checkpoints").glob("step_*"), default=folder / "none")


def _check_data_is_used_again(runs: Runs, variant: str, folder: Path, data: Path) -> None:
    """The clips were away while some prompts were drawn: other bits are right then. But no clip may stay away."""
    more = ("--train.num_steps=6", "--sft.num_steps=6")
    ended = run(runs.arguments(variant, folder / "run", *more, data=data), folder / "resumed").checked()
    if ended.code != 0:
        raise LostError(f"the run cannot be resumed with its data there again: {ended.refusal()}")
    path = folder / "run" / "quarantine.jsonl"
    # What the resumed run did not come to stays on the list, and every start looks at it again.
    kept = [reason for _, reason in read_list(path)] if path.exists() else []
    if any(reason_class(reason) not in PASSING for reason in kept):
        raise LostError(f"clips that are there again are left out for good: {kept[0][:150]}")
