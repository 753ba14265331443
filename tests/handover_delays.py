"""A pytest plugin that shows tests, and code, that depend on which thread comes first:

    HANDOVER_SEED=1 python -m pytest -p tests.handover_delays tests/rollout tests/video

Threads begin late, wake late and are told late, by up to 40 ms each time, and the interpreter switches between them a
thousand times as often. What passes with several seeds does not count on being lucky. Not part of the test command: it
makes tests with threads several times as slow, and those that measure time may fail. Threads of pytest's process only.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MAX_DELAY_S = 0.04
SHARE = 0.1  # of the hand-overs that are delayed

_rng = random.Random(int(os.environ.get("HANDOVER_SEED", "0")))
_sleep = time.sleep  # tests replace time.sleep


def _nap() -> None:
    if _rng.random() < SHARE:
        _sleep(_rng.random() * MAX_DELAY_S)


def _delayed(method: Callable[..., Any], *, before: bool = False, after: bool = False) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            _nap()
        result = method(*args, **kwargs)
        if after:
            _nap()
        return result

    return call


def pytest_configure() -> None:
    """Semaphores, queues and futures are made of conditions, so these four are all there is to delay."""
    sys.setswitchinterval(5e-6)
    threading.Thread.run = _delayed(threading.Thread.run, before=True)
    threading.Condition.wait = _delayed(threading.Condition.wait, after=True)
    threading.Condition.notify = _delayed(threading.Condition.notify, before=True)
    threading.Event.set = _delayed(threading.Event.set, after=True)
