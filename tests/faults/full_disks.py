"""A disk that is full: a small tmpfs where mounting is allowed, else operations that say so. With space again, the run
goes on to the same bits."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults import file_operations
from tests.faults.runs import Ended, Started, run
from tests.faults.trials import Bench
from tests.faults.undisturbed import Runs, check_goes_on, check_same, what_is_left

ENOUGH_BYTES = 64 << 20


def fill_a_disk(bench: Bench, runs: Runs, rng: random.Random) -> None:
    variant = rng.choice(runs.variants)
    folder = bench.empty_folder()
    needed = _bytes_below(runs.undisturbed(variant).after_three.parent / "whole")
    size = rng.randrange(4096, int(1.3 * needed))
    bench.fault = f"{variant} on a tmpfs of {size} bytes"
    with _tmpfs(folder / "disk", size):
        ended = run(runs.arguments(variant, folder / "disk" / "run"), folder / "full")
        _go_on(runs, variant, folder, folder / "disk" / "run", ended)


def fail_operations(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """From one operation on, or just once, every writer gets ENOSPC, EIO or EDQUOT."""
    variant = rng.choice(runs.variants)
    folder = bench.empty_folder()
    at = rng.randint(1, runs.undisturbed(variant).num_operations)
    action = rng.choice([file_operations.FAIL_FROM, file_operations.FAIL_FROM, file_operations.FAIL_ONCE])
    number = rng.choice([errno.ENOSPC, errno.ENOSPC, errno.EIO, errno.EDQUOT])
    once = "" if action == file_operations.FAIL_FROM else " once"
    bench.fault = f"{errno.errorcode[number]}{once} of {variant} from operation {at} on"

    def arm() -> None:
        file_operations.arm(folder / "run", at, action, number)

    ended = Started(runs.arguments(variant, folder / "run"), folder / "full", arm).wait()
    _go_on(runs, variant, folder, folder / "run", ended)


def _go_on(runs: Runs, variant: str, folder: Path, run_folder: Path, ended: Ended) -> None:
    if run_folder.parent.name == "disk":
        _resize(run_folder.parent, ENOUGH_BYTES)
    if ended.checked().code == 0:
        # Telemetry may have lost lines, which it must have said; the weights and the scores are not telemetry.
        left = what_is_left(run_folder, ended) if "warning" not in ended.err.casefold() else None
        if left is not None:
            check_same(left, runs.undisturbed(variant).left)
        return
    ended.refusal()
    (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    check_goes_on(runs, variant, run_folder, folder / "resumed")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@functools.cache
def can_mount() -> bool:
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"], capture_output=True
    )
    return done.returncode == 0


@contextlib.contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
