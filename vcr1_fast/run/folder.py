"""The folder of a run: made and checked before anything slow, and folders put into it whole or not at all.

Called by the training loop at start-up, and by the checkpoint and export code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, on_main_rank

CHECKPOINTS_FOLDER = "checkpoints"  # below train.output_dir

_LOG = logging.getLogger(__name__)
_TEMPORARY_NAME = re.compile(r".+\.tmp-(old-)?\d+")  # NAME.tmp-PID is being written, NAME.tmp-old-PID deleted


def prepare_output_dir(path: str | Path, world: World = SINGLE_PROCESS) -> Path:
    """Make the run's folder, check that it can be written, and delete what a killed save or export left behind.

    Call it on every rank before anything slow. One run per folder: another run's save in progress would be deleted.
    Raises OSError (its subclass, for example PermissionError) when the folder cannot be made or written.
    """
    folder = Path(path).absolute()

    def prepare() -> None:
        try:
            (folder / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / CHECKPOINTS_FOLDER):
                pass
            for parent in (folder, folder / CHECKPOINTS_FOLDER):
                for stale in parent.iterdir():
                    if _TEMPORARY_NAME.fullmatch(stale.name) and stale.is_dir():
                        _LOG.warning("deleting %s, left by a save that did not finish", stale)
                        shutil.rmtree(stale)
        except OSError as error:
            raise OSError(
                error.errno or 0,
                f"train.output_dir is {path}, which cannot be written ({error.strerror}): choose a folder this user "
                "can write, with space on its disk",
            ) from error

    on_main_rank("preparing train.output_dir", prepare, world)
    return folder


def replace_folder(aside: Path, final: Path) -> None:
    """Flush every file and folder below `aside` and rename it to `final`, in place of an older folder there.

    Files get the mode that the umask gives, which that of `aside` shows: safetensors writes them for this user alone.
    """
    file_mode = aside.stat().st_mode & 0o666
    for path in (*aside.rglob("*"), aside):
        if path.is_file():
            with contextlib.suppress(PermissionError):  # of a file system that has no modes
                path.chmod(file_mode)
        _flush(path)
    old = aside.with_name(f"{final.name}.tmp-old-{os.getpid()}")
    if final.exists():  # a folder cannot be renamed onto a full one
        os.rename(final, old)
    os.rename(aside, final)
    _flush(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
