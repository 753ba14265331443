"""The product's command in a process of its own, forked from this one, which has imported everything: 4 s less a start.

A forked run does what `vcr1-fast ARGUMENTS` does from its command line on, up to the exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.faults.trials import CrashedError, LostError
from vcr1_fast.cli import main
from vcr1_fast.run import exit_codes

LIMIT_S = 180.0  # of one run, which takes 1 to 3 s on a machine that has nothing else to do
POLL_S = 0.002
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Fatal Python error|Exception ignored in", re.IGNORECASE)
_ERROR_LINE = re.compile(r"^vcr1-fast: (error.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code` is negative for a signal that killed it."""

    code: int
    out: str
    err: str

    def checked(self, sent: int = 0) -> Ended:
        """This, if it ended as a command may. Raises CrashedError for a traceback, a crash, an unlisted code.

        sent: a signal that ends it where it was sent before there was anything to save.
        """
        text = self.err + self.out
        if found := _TRACEBACK.search(text):
            rest = text[found.start() :]
            lines = [line for line in rest.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
            raise CrashedError((lines or rest.splitlines())[0][:300] + _place(rest))
        if self.code < 0 and self.code not in (-signal.SIGKILL, -sent):
            raise CrashedError(f"killed by {signal.Signals(-self.code).name}")
        known = (0, exit_codes.FAILED, exit_codes.WRONG_USAGE, exit_codes.NO_SIGNAL)
        if self.code not in known and not 0x80 < self.code < 0xA0 and self.code >= 0:
            raise CrashedError(f"exit code {self.code}, which is not listed")
        return self

    def refusal(self) -> str:
        """The line on stderr that says why it did not go on. Raises LostError unless it is exactly one."""
        self.checked()
        lines = _ERROR_LINE.findall(self.err)
        if len(lines) != 1 or len(lines[0]) < 20:
            raise LostError(f"exit code {self.code} with {len(lines)} lines of error: {self.err[-300:]!r}")
        return lines[0]


def _place(text: str) -> str:
    """Where in the product the traceback ends."""
    places = re.findall(r'File "[^"]*/(vcr1_fast/[^"]*)", line (\d+), in (\S+)', text)
    return " at {}:{} {}".format(*places[-1]) if places else ""


class Started:
    """A command that runs. `before` is called in its process first."""

    def __init__(self, arguments: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self._logs = (log.with_suffix(".out"), log.with_suffix(".err"))
        self.began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _run_and_exit(list(arguments), self._logs, before)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its code, once it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> Ended:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        """Until it ends. Raises LostError when it does not."""
        end = time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self._end_all()
                os.waitpid(self.pid, 0)
                self._status = -signal.SIGKILL
                raise LostError(f"it did not end within {limit_s:g} s: {self.text()[-300:]!r}")
            time.sleep(POLL_S)
        self._end_all()
        # killed in its first moment it has not opened them yet
        return Ended(code, *(path.read_text(errors="replace") if path.exists() else "" for path in self._logs))

    def _end_all(self) -> None:
        """Its video workers, too, which would otherwise see its end a moment later."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def until(self, is_reached: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
        """Wait until something is so, or the run has ended; whether it is so."""
        end = time.monotonic() + limit_s
        while not is_reached() and self.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        return is_reached()

    def text(self) -> str:
        """What it has said so far."""
        return "".join(path.read_text(errors="replace") for path in self._logs if path.exists())


def run(arguments: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> Ended:
    return Started(arguments, log, before).wait()


def forked(action: Callable[[], None], log: Path, limit_s: float = LIMIT_S) -> Ended:
    """Anything else in a process of its own: code 0, or 1 with the traceback of what it raises."""
    return Started([], log, lambda: _act_and_exit(action)).wait(limit_s)


def _run_and_exit(arguments: list[str], logs: tuple[Path, Path], before: Callable[[], None] | None) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        for number, path in enumerate(logs, start=1):
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(file, number)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
        if before is not None:
            before()
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # what the interpreter would do
        traceback.print_exc()
    finally:
        code = _leave(code)
        os._exit(code)


def _leave(code: int) -> int:
    """What the interpreter does at its end: waits for threads, calls what is registered, writes what is buffered."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        return 120
    return code


def _act_and_exit(action: Callable[[], None]) -> NoReturn:
    action()
    raise SystemExit(0)
