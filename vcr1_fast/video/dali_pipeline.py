"""An encoded file in, frames on the device out: the one place that speaks DALI's language.

DALI's rules that shape this module (2.4.0, measured):
- it selects frames by index and gives black, without a word, for those that are not there: hence pad_mode "none";
- an error ends the pipeline. Later results of the same pipeline come late or belong to other inputs, so it is built
  anew (3 ms on the CPU);
- it has no index of keyframes for a file in memory: each run decodes from the first frame to the last wanted one, so
  that it is given no more than these need, see dali_cut;
- what it hands out lives in buffers that the next run overwrites.

One file a run. A batch of four files with two batches queued, in one pipeline, took 1.3 to 1.5 times as long for 16 VP9
clips as four threads with a pipeline each, and gave the first clip 2 to 3.5 times later: a batch waits for its longest
file, and a damaged file ends all batches under way.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from vcr1_fast.video.reader import ReaderError

Device = Literal["gpu", "cpu"]

CAUSE_FOLLOWS = "encountered:"  # in DALI's messages: the cause follows
# DALI's own words for it, C++'s, and those of CUDA
NO_MEMORY = (
    *("Can't allocate", "CUDA allocation failed", "bad_alloc", "bad alloc"),
    *("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """Some frames of one file, at a size."""

    encoded_B: np.ndarray  # uint8, the file or a part of it
    indices_F: np.ndarray  # int32, in the order in which the decoder gives them
    size_px: tuple[int, int] | None  # (height, width) as stored, not as displayed; None: as decoded


class DecodeError(Exception):
    """DALI could not decode a job; the text says why, in DALI's words."""


class Pipeline:
    """Decodes one job after the other. For one thread at a time."""

    def __init__(self, device: Device, *, is_resized: bool) -> None:
        """On the current GPU, if on one. Raises RuntimeError when DALI cannot."""
        self.device, self.is_resized = device, is_resized
        self._gpu_index = torch.cuda.current_device() if device == "gpu" else None
        self._pipe: Any = self._built()

    def decode(self, job: Job) -> torch.Tensor:
        """Frames [F, H, W, 3] uint8 on the device.

        Raises DecodeError when the file is at fault, ReaderError when it is not (no memory).
        """
        if self._pipe is None:
            self._pipe = self._built()
        try:
            self._pipe.feed_input("encoded", [job.encoded_B])
            self._pipe.feed_input("frames", [job.indices_F])
            if self.is_resized:
                self._pipe.feed_input("size", [np.array(job.size_px, np.float32)])
            self._pipe.schedule_run()
            (batch,) = self._pipe.share_outputs()
            frames = [torch.from_dlpack(batch[i]).clone() for i in range(len(batch))]
            if self.device == "gpu":
                # DALI reuses the buffer as soon as it is released
                torch.cuda.current_stream(self._gpu_index).synchronize()
            del batch
            self._pipe.release_outputs()
        except Exception as error:  # DALI raises RuntimeError, IndexError and others
            self._pipe = None
            message = str(error)
            if isinstance(error, MemoryError) or any(word in message for word in NO_MEMORY):
                raise ReaderError(
                    f"DALI has not enough memory on the {self.device}: {_cause(message)}; free some, "
                    "or set video.reader to pyav"
                ) from error
            raise DecodeError(_cause(message)) from error
        if len(frames) != 1:
            self._pipe = None
            raise DecodeError(f"gave {len(frames)} results for 1 file")
        return frames[0]

    def _built(self) -> Any:
        dali: Any = importlib.import_module("nvidia.dali")  # its type hints refuse what its manual says
        fn, types = dali.fn, dali.types

        is_gpu = self.device == "gpu"

        @dali.pipeline_def(
            batch_size=1,
            num_threads=2,
            device_id=self._gpu_index if is_gpu else None,
            prefetch_queue_depth=1,
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
