"""torch's profiler over a few steps of a run (`train.profile_steps`): RUN/profile/steps_3-4_rank0.json.gz.

The trace opens in https://ui.perfetto.dev or chrome://tracing, with the parts of a step by the names of `time/NAME_s`.
On a GPU an account of its memory over the same steps lies beside it, for https://pytorch.org/memory_viz. Every rank
writes its own. A step that is profiled takes longer: its times in metrics.jsonl are not those of others.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY_EVENTS = 1_000_000  # the last so many, about 100 bytes each


class StepProfiler:
    """Tell it when a step is over; it begins and ends by itself. Never raises for what it cannot write."""

    def __init__(self, run_folder: Path, rank: int, steps: tuple[int, int] | None, step: int) -> None:
        """`steps`: first and last one to profile; `step`: the last that is over."""
        self._folder, self._rank, self._steps = run_folder / "profile", rank, steps
        self._profiler: Any = None
        self.after(step)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Names a part of a step in the trace."""
        if self._profiler is None:
            yield
            return
        from torch.profiler import record_function

        with record_function(name):
            yield

    def after(self, step: int) -> None:
        """`step` is over."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profiler is None and first - 1 <= step < last:
            self._begin()
        elif self._profiler is not None and step >= last:
            self.close()

    def close(self) -> None:
        """Writes what there is, if it is running: of a run that ends before the last step, too."""
        if self._profiler is None or self._steps is None:
            return
        profiler, self._profiler = self._profiler, None
        name = self._folder / f"steps_{self._steps[0]}-{self._steps[1]}_rank{self._rank}"
        try:
            profiler.__exit__(None, None, None)
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{name}.json.gz")
            _write_memory(f"{name}_memory.pickle")
        except (OSError, RuntimeError) as error:
            print(f"cannot write the profile {name} ({error}); the run goes on without it", file=sys.stderr, flush=True)
            return
        if self._rank == 0:
            print(f"profile of steps {self._steps[0]} to {self._steps[1]}: {name}.json.gz", flush=True)

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.__enter__()


def _write_memory(path: str) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.memory._dump_snapshot(path)
        torch.cuda.memory._record_memory_history(enabled=None)
