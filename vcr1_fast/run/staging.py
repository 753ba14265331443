"""A checkpoint's files -> host memory that the process which writes them shares, in one copy.

One anonymous file a rank (memfd), pinned where there is a GPU. torch's own StateDictStager shares each tensor by a
descriptor of its own in /dev/shm: 2,900 for a 7B model, of 1,024 that a process may mostly open, in a folder that has
64 MB in a container by default. Called by saver.py.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.run.checkpoint_layout import TensorFile

USABLE_FRAC = 0.8  # of the memory that is free when a run starts: videos and answers want some, too
_ALIGNMENT = 64
_GROWTH_BYTES = 64 << 20  # answers that wait differ in size from one checkpoint to the next
_CGROUP = Path("/sys/fs/cgroup")


class Staging:
    """The memory, which grows with what is staged."""

    def __init__(self, device: torch.device) -> None:
        self.descriptor = os.memfd_create("vcr1-checkpoint", os.MFD_CLOEXEC)
        self._device, self._bytes_B = device, torch.empty(0, dtype=torch.uint8)

    def stage(self, files: Sequence[TensorFile]) -> list[tuple[str, int, int]]:
        """Name, first byte and number of bytes of each. When this returns the tensors may change."""
        places, end = [], 0
        for file in files:
            places.append((file.name, end, file.num_bytes))
            end += math.ceil(file.num_bytes / _ALIGNMENT) * _ALIGNMENT
        self._make_room(end)
        for file, (_, begin, _) in zip(files, places, strict=True):
            head = torch.frombuffer(bytearray(file.head), dtype=torch.uint8)
            for part in (head, *file.tensors):
                self._bytes_B[begin : begin + part.numel()].copy_(part, non_blocking=True)
                begin += part.numel()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return places

    def close(self) -> None:
        if self.descriptor >= 0:
            self._pin(False)
            self._bytes_B = torch.empty(0, dtype=torch.uint8)
            os.close(self.descriptor)
            self.descriptor = -1

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes <= self._bytes_B.numel():
            return
        num_bytes = math.ceil(num_bytes / _GROWTH_BYTES) * _GROWTH_BYTES
        self._pin(False)
        os.ftruncate(self.descriptor, num_bytes)
        self._bytes_B: Tensor = torch.frombuffer(mmap.mmap(self.descriptor, num_bytes), dtype=torch.uint8)
        self._pin(True)

    def _pin(self, wanted: bool) -> None:
        """So that the GPU copies at the speed of its link. Memory that cannot be pinned is copied to all the same."""
        runtime: Any = torch.cuda.cudart() if self._device.type == "cuda" else None  # none on a GPU that is played
        if runtime is None or not self._bytes_B.numel():
            return
        address = self._bytes_B.data_ptr()
        if wanted:
            runtime.cudaHostRegister(address, self._bytes_B.numel(), 0)
        else:
            runtime.cudaHostUnregister(address)


def free_host_bytes() -> int:
    """Memory of this machine, or of this container where that has a limit, which can be had without swapping."""
    words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = 1024 * int(words["MemAvailable"].split()[0])
    with contextlib.suppress(OSError, ValueError, KeyError):  # another version of cgroups, or no limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        parts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        free = min(free, limit - used + int(parts["inactive_file"]))
    return free
