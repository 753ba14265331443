"""One run per folder: the second one is refused, wherever it runs, and a killed one blocks nobody.

The first rank holds `lock` in the run's folder with flock, and writes its host, process and start into it. flock is let
go when the process ends, however it does. Some file systems have none, and on others it holds for one machine alone: a
record of another machine, or any where flock fails, is therefore watched for a while. Its owner touches the file every
ten seconds; a file that nobody touches is of a run that is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vcr1_fast.learner.sharding import World, on_main_rank
from vcr1_fast.run.folder import unwritable
from vcr1_fast.settings.config import ConfigError

LOCK_FILE = "lock"
BEAT_S = 10.0  # between two touches of the file
WATCHED_BEATS = 3  # without a touch, then its owner counts as dead


@contextlib.contextmanager
def locked_folder(folder: str | Path, world: World) -> Iterator[None]:
    """The folder, made if need be, is this run's inside the block. A collective.

    Raises ConfigError, on every rank, while another run has it, and OSError where it cannot be made or written.
    """
    with contextlib.ExitStack() as held:
        on_main_rank("locking train.output_dir", lambda: held.enter_context(_locked(Path(folder))), world)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        has_flock = _take_flock(descriptor, path)
        other = _read(descriptor)
        is_remote = other.get("host") != socket.gethostname()
        if other and (is_remote or not has_flock) and _beats(descriptor, other):
            raise _in_use(path, other)
        own = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": time.strftime("%F %T %z")})
        _write(descriptor, own)
        if not has_flock:  # two that begin at the same moment: the last one to write has it
            time.sleep(1.0)
            if json.dumps(_read(descriptor)) != own:
                raise _in_use(path, _read(descriptor))
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(descriptor, done), name="folder-lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            with contextlib.suppress(OSError):  # a folder that is gone
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take_flock(descriptor: int, path: Path) -> bool:
    """False where the file system has none. Raises ConfigError when another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _read(descriptor)) from None
    except OSError:
        return False
    return True


def _in_use(path: Path, other: dict[str, object]) -> ConfigError:
    who = f"process {other.get('pid', '?')} on {other.get('host', '?')}, since {other.get('began', '?')}"
    return ConfigError(
        f"train.output_dir is {path.parent}, in which another run is at work ({who}): wait for it, end it, or choose "
        "another folder"
    )


def _beats(descriptor: int, other: dict[str, object]) -> bool:
    """Whether the owner of the record touches the file; waits for it, by this machine's clock alone."""
    if other.get("host") == socket.gethostname() and not os.path.exists(f"/proc/{other.get('pid')}"):
        return False
    began_ns = os.fstat(descriptor).st_mtime_ns
    until_s = time.monotonic() + WATCHED_BEATS * BEAT_S
    while time.monotonic() < until_s:
        time.sleep(BEAT_S / 10)
        if os.fstat(descriptor).st_mtime_ns != began_ns:
            return True
    return False


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _read(descriptor: int) -> dict[str, object]:
    """The record; {} when there is none, or one that was torn."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write(descriptor: int, record: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, record.encode(), 0)
