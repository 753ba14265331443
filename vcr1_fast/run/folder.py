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
from vcr1_fast.run.checkpoint_files import CHECKPOINTS_FOLDER, is_intact

_LOG = logging.getLogger(__name__)
# NAME.tmp-PID is being written, NAME.tmp-old-PID makes room for it or is being deleted
_TEMPORARY_NAME = re.compile(r"(?P<name>.+)\.tmp-(?P<old>old-)?(?P<pid>\d+)")


def unwritable(path: str | Path, error: OSError) -> OSError:
    """What a run's folder that cannot be made or written is reported as."""
    return OSError(
        error.errno or 0,
        f"train.output_dir is {path}, which cannot be written ({error.strerror}): choose a folder this user "
        "can write, with space on its disk",
    )


def prepare_output_dir(path: str | Path, world: World = SINGLE_PROCESS) -> Path:
    """Make the run's folder, check that it can be written, and settle what a killed save or export left behind.

    What was complete gets its name, the rest is deleted. Call it on every rank before anything slow, and while the
    folder is locked (folder_lock.py): another run's save in progress would be deleted.
    Raises OSError (its subclass, for example PermissionError) when the folder cannot be made or written.
    """
    folder = Path(path).absolute()

    def prepare() -> None:
        try:
            (folder / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / CHECKPOINTS_FOLDER):
                pass
            for parent in (folder, folder / CHECKPOINTS_FOLDER):
                _settle(parent)
        except OSError as error:
            raise unwritable(path, error) from error

    on_main_rank("preparing train.output_dir", prepare, world)
    return folder


def _settle(parent: Path) -> None:
    """Every NAME.tmp-PID in `parent` becomes NAME where it is complete; the others, and NAME.tmp-old-PID, are deleted.

    Complete is a checkpoint that is intact, and whatever an older folder has already made room for (replace_folder).
    """
    matches = [(path, _TEMPORARY_NAME.fullmatch(path.name)) for path in sorted(parent.iterdir()) if path.is_dir()]
    stale = [(path, match) for path, match in matches if match]
    for path, match in stale:
        final, old = parent / match["name"], parent / f"{match['name']}.tmp-old-{match['pid']}"
        if not match["old"] and ((old.exists() and not final.exists()) or is_intact(path)):
            _LOG.warning("%s is complete although the run ended before it had its name: it is %s now", path, final.name)
            replace_folder(path, final)
    for path, _ in stale:
        if path.exists():
            _LOG.warning("deleting %s, left by a save that did not finish", path)
            shutil.rmtree(path)


def replace_folder(aside: Path, final: Path) -> None:
    """Flush every file and folder below `aside` and rename it to `final`, in place of an older folder there.

    A process that dies between the two renames leaves both folders, and `prepare_output_dir` does the second one.
    Files get the mode that the umask gives, which that of `aside` shows: safetensors writes them for this user alone.
    """
    file_mode = aside.stat().st_mode & 0o666
    for path in (*aside.rglob("*"), aside):
        if path.is_file():
            with contextlib.suppress(PermissionError):  # of a file system that has no modes
                path.chmod(file_mode)
        _flush(path)
    match = _TEMPORARY_NAME.fullmatch(aside.name)
    old = aside.with_name(f"{final.name}.tmp-old-{match['pid'] if match else os.getpid()}")
    if final.exists():  # a folder cannot be renamed onto a full one
        shutil.rmtree(old, ignore_errors=True)
    try:
        if final.exists():
            os.rename(final, old)
        os.rename(aside, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # what is left of it the next start deletes


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
