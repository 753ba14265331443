"""After which steps a run saves a checkpoint, and whether it then ends: the same on all ranks.

    with Stopping(config.checkpoint, num_steps, world) as stopping:
        for step in ...:
            ...
            if stopping.wants_checkpoint(step):
                (save)
            stopping.end_if_asked(step)

Called by the loops of train.py and sft.py.
"""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Self

from vcr1_fast.learner.sharding import World, all_max_int
from vcr1_fast.run.stop_signals import StoppedBySignal, StopSignals
from vcr1_fast.settings.config import CheckpointConfig


class Stopping:
    """See the module's docstring."""

    def __init__(self, config: CheckpointConfig, num_steps: int, world: World, eval_every: int = 0) -> None:
        """`eval_every`: steps between held-out scores, each of which has a checkpoint with checkpoint.keep_best."""
        self._every = [config.every, eval_every if config.keep_best else 0]
        self._config, self._num_steps, self._world = config, num_steps, world
        self._signals = StopSignals()
        self._signum = 0  # that all ranks know of
        self._saved_s = time.monotonic()

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        self._signals.__exit__()
        if kind is None and self._signals.signum:  # it came after the last step's check; that step is saved
            os.kill(os.getpid(), self._signals.signum)

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the state after this step is to be saved: every so many steps, after so many minutes by the first
        rank's clock, at the end, and when a signal reached any rank. A collective, once a step."""
        late_s = 60 * self._config.every_minutes
        is_late = self._world.is_main and late_s > 0 and time.monotonic() - self._saved_s >= late_s
        asked = all_max_int(self._signals.signum << 1 | is_late, self._world)
        self._signum = asked >> 1
        is_due = any(every > 0 and step % every == 0 for every in self._every)
        wants = bool(asked) or step == self._num_steps or is_due
        if wants:
            self._saved_s = time.monotonic()
        return wants

    def end_if_asked(self, step: int) -> None:
        """Raises StoppedBySignal, on every rank alike."""
        if self._signum:
            raise StoppedBySignal(self._signum, step)
