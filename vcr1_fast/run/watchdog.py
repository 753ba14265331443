"""A run that hangs says where: after `train.watchdog_s` without a step every rank prints its threads' Python stacks.

Ranks wait for each other in collectives, so all of them are late together, and the one whose stack is elsewhere is the
cause. The stacks are printed by faulthandler's own thread, which needs no interpreter lock: a decoder that hangs with
the lock held is seen, too.
"""

from __future__ import annotations

import faulthandler
import sys
import threading

STDERR_FD = 2  # not sys.stderr, which may be another object by then
AHEAD_S = 0.2  # of the stacks comes the line that says whose they are


class Watchdog:
    """`feed` it after each step. Prints again after each further `limit_s` seconds; 0: never."""

    def __init__(self, limit_s: float, rank: int) -> None:
        self.limit_s, self.rank = limit_s, rank
        self._timer: threading.Timer | None = None
        self.feed()

    def feed(self) -> None:
        """The run goes on: wait anew."""
        if self.limit_s <= 0:
            return
        self.close()
        self._timer = threading.Timer(max(0.0, self.limit_s - AHEAD_S), self._announce)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(self.limit_s, repeat=True, file=STDERR_FD)

    def close(self) -> None:
        """Print nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _announce(self) -> None:
        print(
            f"rank {self.rank}: no step ended for {self.limit_s:g} s (train.watchdog_s); its threads are at:",
            file=sys.stderr,
            flush=True,
        )
