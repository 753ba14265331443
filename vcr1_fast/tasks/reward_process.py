"""The trainer's end of one `reward_worker`: start it, have a user's code score answers there, end it when it hangs.

A reward can hang in a regular expression that holds the GIL, call os._exit, or crash: in the trainer's process that
would be the end of the run, or its standstill. Used by `custom.CheckedTask`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from vcr1_fast.run.stop_signals import kept_from_children
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.types import Example

START_LIMIT_S = 300.0  # the user's module may load a model


class RewardError(ValueError):
    """A user's code raised, or gave what is no score. The message says whose, and what."""


class RewardTimeoutError(RewardError):
    """It took longer than task.reward_timeout_s."""


class RewardProcess:
    """One process at a time, started with the first question and after each one that did not come back.

    Any number of threads may ask; they take turns.
    """

    def __init__(self, config: TaskConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, task: str, member: str, what: str, examples: Sequence[Example], answers: Sequence[str]) -> Any:
        """What `CheckedTask.call_here` gives over there. `what`: the user's code, in words. Raises RewardError."""
        timeout_s = self._config.reward_timeout_s
        with self._lock:
            try:
                connection = self._connection or self._start()
                connection.send((task, member, list(examples), list(answers)))
                is_there = connection.poll(timeout_s)
                is_good, result = connection.recv() if is_there else (False, "")
            except (EOFError, OSError):
                raise RewardError(f"{what} ended its process: {self._end()}") from None
            except RewardError:
                self._end()
                raise
            except Exception as error:  # whatever cannot be pickled, such as a truth that holds a lock
                raise RewardError(
                    f"{what} cannot be asked in its process ({type(error).__name__}: {error}): make what parse_truth "
                    "gives of plain values, or set task.reward_timeout_s=0"
                ) from error
            if not is_there:
                self._end()
                raise RewardTimeoutError(
                    f"{what} did not finish within {timeout_s:g} s (task.reward_timeout_s); its process was ended"
                )
        if not is_good:
            raise RewardError(result)
        return result

    def _start(self) -> Connection:
        """Raises RewardError, EOFError or OSError."""
        mine, child = socket.socketpair()
        with child, kept_from_children():
            self._process = subprocess.Popen(
                (sys.executable, "-u", "-m", "vcr1_fast.tasks.reward_worker", str(child.fileno())),
                stdin=subprocess.DEVNULL,
                pass_fds=(child.fileno(),),
                start_new_session=True,  # Ctrl-C ends the run in order and does not tear a step away in the middle
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self._connection = Connection(mine.detach())
        weakref.finalize(self, _end, self._process, self._connection)
        deadline = time.monotonic() + START_LIMIT_S
        self._connection.send(self._config)
        if not self._connection.poll(deadline - time.monotonic()):
            raise RewardError(f"the process that runs your rewards did not start within {START_LIMIT_S:.0f} s")
        problem = self._connection.recv()
        if problem:
            raise RewardError(f"the process that runs your rewards did not start: {problem}")
        return self._connection

    def _end(self) -> str:
        """Kill the process; returns how it ended, in words."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        code = _end(process, connection)
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _end(process: subprocess.Popen[bytes] | None, connection: Connection | None) -> int:
    if connection is not None:
        connection.close()
    if process is None:
        return 0
    try:
        return process.wait(0.1)  # it may have ended by itself, whose status is worth more than our signal
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
