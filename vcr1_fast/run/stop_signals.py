"""Signals that ask a run to end: noted at once, obeyed by stopping.py after the step, and kept from its children.

SIGTERM is what schedulers and `docker stop` send, SIGINT is Ctrl-C, SIGHUP a terminal that closes, SIGUSR1 what Slurm
sends with --signal. Imports no torch: processes of videos and engines are started under `kept_from_children`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from vcr1_fast.run.exit_codes import STOPPED_BY_SIGNAL
from vcr1_fast.run.telemetry import is_main_rank, silence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
RAISE_AGAIN_S = 0.01  # by then the callback that an interrupt fell into is over
SAME_PRESS_S = 1.0  # torchrun hands a Ctrl-C of the terminal, which its ranks got as well, on to them once more


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started inside the block, and theirs, never see the stop signals: they end with their parent.

    Slurm signals every process of a job step, and a worker that dies of it would take the step in progress with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_usr1() -> None:
    """End SIGUSR1's being ignored, which configs/slurm.sh has torchrun's ranks begin with."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def heed_one_interrupt() -> None:
    """From here on one Ctrl-C raises KeyboardInterrupt, after which what a command began is taken down again.

    A second one never breaks into that with a traceback: it ends the process at once, and within SAME_PRESS_S does
    nothing. One that falls into a `__del__` or a callback, where the interpreter drops every exception, is raised again
    a moment later. Does nothing where SIGINT is ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    pressed_s: list[float] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if not pressed_s:
            pressed_s.append(time.monotonic())
            raise KeyboardInterrupt
        if time.monotonic() - pressed_s[0] > SAME_PRESS_S:
            os._exit(STOPPED_BY_SIGNAL + number)

    def note_again() -> None:
        pressed_s.clear()
        os.kill(os.getpid(), signal.SIGINT)

    def on_dropped(dropped: sys.UnraisableHookArgs) -> None:
        if pressed_s and dropped.exc_type is KeyboardInterrupt:
            threading.Timer(RAISE_AGAIN_S, note_again).start()
        else:
            say_dropped(dropped)

    say_dropped = sys.unraisablehook
    sys.unraisablehook = on_dropped
    signal.signal(signal.SIGINT, note)


def heed_no_interrupt() -> None:
    """When all is done and said: Ctrl-C ends the process, without a traceback from the interpreter's own end."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class StoppedBySignal(Exception):  # noqa: N818 - not an error: the run is saved
    """The run ended after a step because a signal asked for it; what it did is in a checkpoint."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"ended by {signal.Signals(signum).name} after step {step}, which is saved: start it again to go on"
        )
        self.signum = signum


class StopSignals:
    """Inside the block the first stop signal is noted in `signum`, and a second Ctrl-C ends the process at once.

    A thread hears of them from the interpreter's C handler: the main thread may sit in a collective for an hour.
    SIGINT and SIGHUP stay ignored where they were, as under nohup. Does nothing outside of the main thread.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._noted_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._ends: tuple[int, int] | None = None  # of the pipe
        self._previous_fd = -1
        self._thread: threading.Thread | None = None
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reading, writing = self._ends = os.pipe()
        os.set_blocking(writing, False)
        self._previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous is signal.SIG_IGN and number in (signal.SIGINT, signal.SIGHUP):
                continue
            self._previous[number] = signal.signal(number, _do_nothing)
            signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._listen, args=(reading,), name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._ends is not None and self._thread is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._ends[1])
            self._thread.join()
            os.close(self._ends[0])
            self._ends = None

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in self._previous:
                    self._note(number)

    def _note(self, number: int) -> None:
        now_s = time.monotonic()
        for descriptor in self._terminals:
            if not os.isatty(descriptor):  # it hung up: a line printed there would raise before the checkpoint
                silence(descriptor)
        if not self.signum:
            self.signum, self._noted_s = number, now_s
            if is_main_rank():
                name = signal.Signals(number).name
                print(
                    f"{name}: the run ends after this step, with a checkpoint; Ctrl-C ends it now, without one",
                    file=sys.stderr,
                    flush=True,
                )
        elif number == signal.SIGINT and now_s - self._noted_s > SAME_PRESS_S:
            os._exit(STOPPED_BY_SIGNAL + number)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """The interpreter writes to the pipe before it calls a handler, and only where there is one."""
