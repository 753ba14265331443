"""Starts scripted workers without the 2 s of CPU that importing torch takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from typing import IO

from tests.rollout.sglang import scripted_worker

# Forked from a process that has the imports and no threads: of one in which another thread uses ZeroMQ, the child may
# wait for ever for a lock that nobody holds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([scripted_worker.__name__])


class Forked:
    """`subprocess.Popen` as process.py uses it, but forked: a worker is there in 20 ms."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: IO[bytes], **_: object) -> None:
        self._process = _FORKS.Process(target=_run, args=(command, env, stdout.name), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError):
            while self.poll() is None and os.getpgid(self.pid) != self.pid:  # else it cannot be killed as a group
                time.sleep(0.001)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 60.0) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("scripted worker", timeout)
        return code


def _run(command: list[str], environment: dict[str, str], log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    scripted_worker.main(*command[-2:])
