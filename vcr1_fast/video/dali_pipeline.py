"""Encoded files in, frames on the device out: the one place that speaks DALI's language.

DALI's rules that shape this module (2.4.0, measured):
- it selects frames by index and gives black, without a word, for those that are not there: hence pad_mode "none";
- an error ends the pipeline. Later results of the same pipeline come late or belong to other inputs, so it is built
  anew (3 ms on the CPU);
- it has no index of keyframes for a file in memory: each run decodes from the first frame to the last wanted one;
- what it hands out lives in buffers that the next run overwrites.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Device = Literal["gpu", "cpu"]

CAUSE_FOLLOWS = "encountered:"  # in DALI's messages: the cause follows
NOT_THE_FILE = ("out of memory", "bad alloc", "bad_alloc", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


@dataclass(frozen=True, slots=True)
class Job:
    """Some frames of one file, at a size."""

    encoded_B: np.ndarray  # uint8, the whole file
    indices_F: np.ndarray  # int32, in the order in which the decoder gives them
    size_px: tuple[int, int] | None  # (height, width) as stored, not as displayed; None: as decoded


class DecodeError(Exception):
    """DALI could not decode a job; the text says why, in DALI's words."""


class Pipeline:
    """Runs batches of jobs, in order, ahead of `collect`. For one thread at a time."""

    def __init__(
        self, device: Device, batch_size: int, num_ahead: int, *, is_resized: bool, gpu_index: int | None = None
    ) -> None:
        """`num_ahead` batches may be submitted before the first is collected. Raises RuntimeError when DALI cannot.

        `gpu_index`: which GPU; None: the current one of this thread (in a new thread that is 0 again).
        """
        self.device, self.batch_size, self.num_ahead, self.is_resized = device, batch_size, num_ahead, is_resized
        self._gpu_index = torch.cuda.current_device() if device == "gpu" and gpu_index is None else gpu_index
        self._waiting: deque[int] = deque()  # sizes of the batches submitted
        self._pipe: Any = self._built()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start up to `batch_size` jobs. They are done side by side."""
        assert 0 < len(jobs) <= self.batch_size and self.num_waiting < self.num_ahead
        if self._pipe is None:
            self._pipe = self._built()
        self._pipe.feed_input("encoded", [job.encoded_B for job in jobs])
        self._pipe.feed_input("frames", [job.indices_F for job in jobs])
        if self.is_resized:
            self._pipe.feed_input("size", [np.array(job.size_px, np.float32) for job in jobs])
        self._waiting.append(len(jobs))
        self._pipe.schedule_run()

    def collect(self) -> list[torch.Tensor]:
        """Frames [F, H, W, 3] uint8 of each job of the batch submitted first, on the device.

        Raises DecodeError when any job of any batch under way fails; then all of them are gone and must be submitted
        again. Raises RuntimeError when it is not the fault of the jobs (no memory).
        """
        num_jobs = self._waiting[0]
        try:
            (batch,) = self._pipe.share_outputs()
            frames = [torch.from_dlpack(batch[i]).clone() for i in range(len(batch))]
            if self.device == "gpu":
                torch.cuda.current_stream(
                    self._gpu_index
                ).synchronize()  # DALI reuses the buffer as soon as it is released
            del batch
            self._pipe.release_outputs()
        except Exception as error:  # DALI raises RuntimeError, IndexError and others
            self.discard()
            message = str(error)
            if isinstance(error, MemoryError) or any(word in message for word in NOT_THE_FILE):
                raise RuntimeError(f"DALI has not enough memory: {_cause(message)}") from error
            raise DecodeError(_cause(message)) from error
        if len(frames) != num_jobs:
            self.discard()
            raise DecodeError(f"gave {len(frames)} results for {num_jobs} files")
        self._waiting.popleft()
        return frames

    def discard(self) -> None:
        """Forget everything under way and free what DALI holds; the next `submit` builds anew."""
        self._waiting.clear()
        self._pipe = None

    def _built(self) -> Any:
        dali: Any = importlib.import_module("nvidia.dali")  # its type hints refuse what its manual says
        fn, types = dali.fn, dali.types

        is_gpu = self.device == "gpu"

        @dali.pipeline_def(
            batch_size=self.batch_size,
            num_threads=max(2, self.batch_size),
            device_id=self._gpu_index if is_gpu else None,
            prefetch_queue_depth=self.num_ahead,
            exec_dynamic=True,
        )
        def decode() -> Any:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, batch=True)
            frames = fn.external_source(name="frames", ndim=1, dtype=types.INT32, batch=True)
            # affine=False: the cores that DALI would pin its threads to belong to the rollout workers as well.
            options = {"device": "mixed", "affine": False} if is_gpu else {"device": "cpu"}
            rgb = fn.decoders.video(encoded, frames=frames, pad_mode="none", **options)
            if self.is_resized:
                size = fn.external_source(name="size", ndim=1, dtype=types.FLOAT, batch=True)
                rgb = fn.resize(rgb, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            return rgb

        pipe = decode()
        pipe.build()
        return pipe


def _cause(message: str) -> str:
    """The one line of DALI's message that says what happened."""
    _, _, behind = message.rpartition(CAUSE_FOLLOWS)
    lines = [line.strip() for line in behind.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
