"""All kinds of faults by name. Nothing here is imported before it is wanted: torch takes 3 s."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.trials import Trial


@dataclass(frozen=True)
class Kind:
    """Where a kind's trial is, and whether it needs file_operations.c."""

    place: str
    needs_library: bool = False


KINDS: dict[str, Kind] = {
    "kill": Kind("kills:kill_at_a_moment"),
    "operation": Kind("kills:kill_at_an_operation", needs_library=True),
    "save": Kind("saves:kill_in_a_save", needs_library=True),
    "bits": Kind("saves:damage_a_checkpoint"),
    "folder": Kind("damaged_folders:damage_a_run"),
    "model": Kind("damaged_folders:damage_a_model"),
    "tmpfs": Kind("full_disks:fill_a_disk"),
    "errno": Kind("full_disks:fail_operations", needs_library=True),
    "vanish": Kind("vanishing:take_a_folder_away"),
    "signal": Kind("signals:send_a_signal"),
    "two": Kind("two_runs:start_a_second_run"),
    "judge": Kind("judges:ask_a_bad_judge"),
    "reward": Kind("judges:call_a_bad_reward"),
    "clip": Kind("clips:read_a_mutated_clip"),
    "clips": Kind("clips:train_on_a_mutated_clip"),
    "worker": Kind("workers:kill_workers"),
    "frame": Kind("frames:be_hostile"),
}


def make_kinds(folder: Path, names: Sequence[str]) -> dict[str, Trial]:
    import torch

    torch.set_num_threads(1)
    from tests.faults.undisturbed import Runs

    for name in ("train", "sft", "evaluate"):  # what the runs, which are forked, need not import again
        importlib.import_module(f"vcr1_fast.{name}")
    runs = Runs(folder)

    def trial(name: str) -> Trial:
        module, _, function = KINDS[name].place.partition(":")
        made = getattr(importlib.import_module(f"tests.faults.{module}"), function)
        return functools.partial(_call, made, runs)

    return {name: trial(name) for name in names}


def _call(made, runs, bench, rng) -> None:
    made(bench, runs, rng)
