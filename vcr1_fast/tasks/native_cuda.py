"""The CUDA half of the compiled module for arrays of this process, and the choice between the halves.

In: the NumPy arrays of a batch, from tasks/overlap.py (once per task and batch of answers) and tasks/reward_groups.py
(once per step). Out: what the CPU half gives, bit for bit, its errors included. `open_run` calls `choose_half` once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vcr1_fast import native
from vcr1_fast.learner.sharding import World, all_reduce_sum

# Evaluation scores the answers one by one for its confidence intervals, thousands of them; a launch each buys nothing.
MIN_ANSWERS = 2


class OnCuda:
    """A `native.Half`: one copy to the device, one kernel, one copy back, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        # the default stream would wait for the learner's kernels when answers are scored beside an update
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, name: str, inputs: Sequence[Any], out: np.ndarray) -> None:
        """See `native.Half`. For any thread."""
        if out.size < MIN_ANSWERS:
            native.on_cpu(name, inputs, out)
            return
        with torch.cuda.stream(self._stream):  # makes its device the thread's current one, too
            on_device = self._copied([value for value in inputs if isinstance(value, np.ndarray)])
            arguments = [next(on_device) if isinstance(value, np.ndarray) else value for value in inputs]
            out_N = torch.empty(out.shape, dtype=torch.float64, device=self._device)
            getattr(native.module, f"{name}_cuda")(*arguments, out_N, self._stream.cuda_stream)
            torch.from_numpy(out).copy_(out_N)  # waits
        if np.isnan(out).any():  # the kernel's word for an answer that the CPU half refuses: let that one say why
            native.on_cpu(name, inputs, out)

    def _copied(self, arrays: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """The arrays on the device, by one transfer: all have items of 8 bytes."""
        packed = torch.from_numpy(np.concatenate([array.reshape(-1).view(np.int64) for array in arrays]))
        pieces = packed.to(self._device).split([array.size for array in arrays])
        for array, piece in zip(arrays, pieces, strict=True):
            yield piece.view(torch.float64 if array.dtype == np.float64 else torch.int64).view(array.shape)


def choose_half(world: World) -> None:
    """Decide what computes overlaps and advantages from now on, on all ranks alike. A collective.

    CUDA where the run is on it, the module has its CUDA half, and a small batch gives the CPU half's bits on every
    rank; else the CPU half, or plain Python where there is no module. No result depends on the choice.

    Nor is a step faster by it. One call of the CPU half takes, measured on 2 shared cores, in microseconds for 32 / 512
    / 4096 answers: 5 / 10 / 70 for intervals, 5 / 13 / 140 for tracks of 8 boxes, 2 / 3 / 12 for advantages; the lists
    that become arrays before it, on either half, 235 for 512 intervals and 780 for 512 tracks. Predicted for an H200,
    not measured: 80 to 120 a call (a dozen small tensor operations, two waits, one launch), 600 for 4096 tracks (2 MB
    to copy) and 300 for 4096 advantages of scale "batch" (one thread adds them up): 0.2 ms a step of 512 answers.
    """
    half, reason = _cuda_half(world.device)
    num_without = int(all_reduce_sum({"without": float(half is None)}, world)["without"])
    if half is not None and num_without == 0:
        native.use(half, "C++ on CUDA")
    elif not native.is_available():
        native.use(native.on_cpu, native.status())
    elif world.device.type == "cuda":
        reason = reason or f"{num_without} of {world.world_size} ranks cannot use the CUDA half"
        native.use(native.on_cpu, f"C++ on the CPU: {reason}")
    else:
        native.use(native.on_cpu, "C++")


def _cuda_half(device: torch.device) -> tuple[OnCuda | None, str]:
    """The CUDA half, or None and, on CUDA, why this rank cannot use it."""
    if device.type != "cuda":
        return None, ""
    if not native.has_cuda():
        return None, "the compiled module has no CUDA half, as no nvcc was there when it was built"
    try:
        half = OnCuda(device)
        for name, inputs, count in _probes():
            got, wanted = np.empty(count), np.empty(count)
            half(name, inputs, got)
            native.on_cpu(name, inputs, wanted)
            if got.tobytes() != wanted.tobytes():
                return None, f"{name} gives {got.tolist()} on {device}, wanted {wanted.tolist()}; please report it"
    except RuntimeError as error:  # a driver that is too old, or a GPU that there is no machine code for
        return None, str(error)
    return half, ""


def _probes() -> Iterator[tuple[str, tuple[Any, ...], int]]:
    """A small batch for every kind of result: function, inputs, number of results."""
    thirds = np.arange(12.0) / 3.0  # rounding shows in these
    starts, intervals, boxes = np.array([0, 1, 3]), np.stack([thirds[:3], thirds[4:7]], axis=1), thirds.reshape(3, 4)
    for kind in ("set", "hull", "iop"):
        yield "interval_overlap", (intervals, starts, intervals * 0.9, np.array([0, 2, 3]), kind), 2
    yield "track_overlap", (boxes, starts, boxes * 0.9, starts, 0), 2
    for scale in ("group", "batch", "none"):
        yield "group_advantages", (thirds * thirds, np.array([0, 5, 12]), scale), 12
