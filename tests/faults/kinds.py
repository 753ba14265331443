"""All kinds of faults by name. Nothing here is imported before it is wanted: torch takes 3 s."""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.trials import Bench, Trial

if TYPE_CHECKING:
    from tests.faults.undisturbed import Runs


@dataclass(frozen=True)
class Kind:
    """Where a kind's trial is, whether it needs file_operations.c, and how often the short form tries it."""

    place: str
    needs_library: bool = False
    num_short: int = 0


KINDS: dict[str, Kind] = {
    "kill": Kind("kills:kill_at_a_moment", num_short=1),
    "operation": Kind("kills:kill_at_an_operation", needs_library=True, num_short=1),
    "save": Kind("saves:kill_in_a_save", needs_library=True, num_short=10),
    "bits": Kind("saves:damage_a_checkpoint", num_short=10),
    "folder": Kind("damaged_folders:damage_a_run", num_short=1),
    "model": Kind("damaged_folders:damage_a_model", num_short=1),
    "tmpfs": Kind("full_disks:fill_a_disk"),
    "errno": Kind("full_disks:fail_operations", needs_library=True, num_short=1),
    "vanish": Kind("vanishing:take_a_folder_away"),
    "signal": Kind("signals:send_a_signal", num_short=1),
    "two": Kind("two_runs:start_a_second_run"),
    "judge": Kind("judges:ask_a_bad_judge", num_short=1),
    "reward": Kind("judges:call_a_bad_reward"),
    "clip": Kind("clips:read_a_mutated_clip", num_short=5),
    "clips": Kind("clips:train_on_a_mutated_clip"),
    "worker": Kind("workers:kill_workers"),
    "writer": Kind("writers:disturb_the_writer", num_short=1),
    "eval": Kind("evaluations:disturb_an_evaluation", needs_library=True),
    "ranks": Kind("ranks:disturb_one_rank", needs_library=True),
    "frame": Kind("frames:be_hostile", num_short=2),
}
# What a run imports late, 1 s of each of thousands of forked ones
LATE = (
    *("vcr1_fast.train", "vcr1_fast.sft", "vcr1_fast.evaluate", "vcr1_fast.rollout.serve"),
    *("torch.utils.tensorboard", "fsspec.implementations.local", "numpy.ma"),
)


def make_kinds(folder: Path, names: Sequence[str], variants: Sequence[str] | None = None) -> dict[str, Trial]:
    """`variants`: of runs, all by default; see undisturbed.VARIANTS."""
    import torch

    torch.set_num_threads(1)
    from tests.faults.undisturbed import VARIANTS, Runs

    for name in LATE:
        importlib.import_module(name)
    runs = Runs(folder, tuple(variants or VARIANTS))

    def trial(name: str) -> Trial:
        module, _, function = KINDS[name].place.partition(":")
        made = getattr(importlib.import_module(f"tests.faults.{module}"), function)
        return functools.partial(_call, made, runs)

    return {name: trial(name) for name in names}


def _call(made: Callable[[Bench, Runs, random.Random], None], runs: Runs, bench: Bench, rng: random.Random) -> None:
    made(bench, runs, rng)
