"""Starts scripted workers without the 2 s of CPU that importing torch takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import IO

from tests.rollout.sglang import scripted_worker


class Forked:
    """`subprocess.Popen` as process.py uses it, but forked: a worker is there in 20 ms."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: IO[bytes], **_: object) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            os.dup2(stdout.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # and not the test runner's
            os.environ.clear()
            os.environ.update(env)
            scripted_worker.main(*command[-2:])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else code
            os.write(2, f"{end.code}\n".encode() if code == 1 else b"")
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("scripted worker", timeout)
            time.sleep(0.005)
        return code
