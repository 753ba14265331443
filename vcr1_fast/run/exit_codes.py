"""What the exit code of a command means to a script, as in docs/reliability.md. 0: done, 2: wrong usage."""

from __future__ import annotations

FAILED = 1  # the last line on stderr says what, and what to do
WRONG_USAGE = 2
NO_SIGNAL = 3  # training went through all its steps without one non-zero gradient: the model is as it was
STOPPED_BY_SIGNAL = 128  # plus the signal's number, as shells have it: a checkpoint was saved, start again to go on
