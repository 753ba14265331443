"""`vcr1-fast eval` killed, on a full disk, or with damaged answers: the next start goes on to the same scores."""

from __future__ import annotations

import errno
import functools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import damage, file_operations
from tests.faults.runs import Started, run
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, counting


@dataclass(frozen=True)
class Scored:
    """What an evaluation left, without the name of its folder."""

    scores: Any
    samples: str


def disturb_an_evaluation(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder, name = bench.empty_folder(), rng.choice(["kill", "operation", "ENOSPC", "damage", "damage"])
    scored, seconds, num_operations = _undisturbed(runs)
    at, moment = rng.randint(1, num_operations), rng.uniform(0.3 * seconds, seconds)
    bench.fault = f"{name} of eval, " + (f"{moment:.2f} s" if name in ("kill", "damage") else f"operation {at}")

    def arm() -> None:
        if name == "operation":
            file_operations.arm(folder / "eval", at, file_operations.KILL)
        elif name == "ENOSPC":
            file_operations.arm(folder / "eval", at, file_operations.FAIL_FROM, errno.ENOSPC)

    started = Started(_arguments(runs, folder / "eval"), folder / "disturbed", arm)
    if name in ("kill", "damage"):
        time.sleep(moment)
        started.kill()
    ended = started.wait().checked()
    if ended.code > 0:
        ended.refusal()
    has_files = any((folder / "eval").rglob("*"))
    if name == "damage" and has_files:
        bench.fault += f", {damage.damage_a_file(rng, folder / 'eval')}"
    again = run(_arguments(runs, folder / "eval"), folder / "again").checked()
    if again.code != 0 and name == "damage":
        again.refusal()
        return
    if again.code != 0:
        raise LostError(f"the evaluation cannot go on: {again.refusal()}")
    if _scored(folder / "eval") != scored:
        raise LostError("scores or samples are other ones than undisturbed, without a word")


def _arguments(runs: Runs, folder: Path) -> list[str]:
    """Eight examples in batches of two, each batch kept as it comes."""
    data = f"--data.eval=[{runs.data}/train_grounding.jsonl]"
    small = ("--video.max_frames=4", "--video.min_frame_pixels=784", "--video.max_frame_pixels=784")
    sizes = ("--rollout.max_batch_rows=2", "--rollout.max_new_tokens=12", "--video.num_workers=0")
    return ["eval", "tiny", "--model.path=tiny", data, f"--eval.output_dir={folder}", *sizes, *small]


@functools.cache
def _undisturbed(runs: Runs) -> tuple[Scored, float, int]:
    folder = runs.folder / "undisturbed" / "eval"
    folder.mkdir(parents=True)
    began = time.monotonic()
    ended = run(_arguments(runs, folder / "eval"), folder / "log", counting(folder / "eval", folder / "operations"))
    if ended.checked().code != 0:
        raise RuntimeError(f"the undisturbed evaluation ended with {ended.code}: {ended.err[-2000:]}")
    counted = folder / "operations"
    num_operations = int(counted.read_text()) if counted.exists() else 1
    return _scored(folder / "eval"), time.monotonic() - began, num_operations


def _scored(folder: Path) -> Scored:
    try:
        return Scored(
            json.loads((folder / "scores.json").read_text())["scores"], (folder / "samples.jsonl").read_text()
        )
    except (OSError, ValueError, KeyError) as error:
        raise LostError(f"after an evaluation that ended with 0: {type(error).__name__}: {error}") from error
