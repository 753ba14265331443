"""A folder below the system's temporary one that only this user can enter, and that does not outlive its owner long.

The owner holds a lock on a file in it. A process that is killed leaves its folder and loses the lock; the next one that
makes a folder removes such leftovers. A lock and not a process id: ids of other containers mean nothing here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "in-use"


class PrivateFolder:
    """`path` exists until `close`, mode 700."""

    def __init__(self, prefix: str) -> None:
        """Raises OSError when there is no room. Folders of that prefix whose owners are gone are removed."""
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        # Locked before it has its name: a file of that name without a lock means that the owner is gone.
        descriptor, name = tempfile.mkstemp(dir=self.path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(name, self.path / _LOCK)
        self._descriptor = descriptor
        _remove_left_behind(self.path.parent, prefix)

    def close(self) -> None:
        """Remove it; a second call does nothing."""
        if self._descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _remove_left_behind(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # in use, or somebody else is at it
            if folder.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
