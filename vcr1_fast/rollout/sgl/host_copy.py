"""The weights in host memory, from which a worker that is started again is fed: 16.6 GB for 7B in bfloat16.

In: the buckets of each push. Out: all weights, in buckets that every process of this user on this machine can open.

Ranks of one machine that push together keep one copy between them, not one each: all see the same buckets in the same
order, and the k-th is kept by the (k mod N)-th of the N ranks. At both ends of a push, which is a collective
(run/weight_sync.py), each hears what all have told: at its beginning that nobody reads any more, at its end where the
buckets lie. Between the two nobody may read, so a worker that is lost then is fed when it is used next.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.messages import File, SharedBytes, mapped
from vcr1_fast.rollout.sgl.weights import Bucket, Slot
from vcr1_fast.types import RunError

Told = tuple[str, Mapping[str, File]]  # a rank's machine, and the buckets that it keeps, each by its first weight


class HostCopy:
    """See the module's docstring. Until `begin` says otherwise this process keeps every bucket."""

    def __init__(self, *, is_kept: bool = True) -> None:
        """`is_kept`: `rollout.sglang.keep_host_copy`; False: there is nothing to feed a lost worker with."""
        self._is_kept = is_kept
        self.awaits_others = False  # a push has begun, and other ranks may still write
        self._buckets: list[tuple[tuple[Slot, ...], SharedBytes | None]] = []  # None: another rank keeps it
        self._places: dict[str, tuple[SharedBytes | None, Slot]] = {}  # of each weight
        self._index, self._num_ranks = 0, 1
        self._files: dict[str, File] = {}  # of all ranks of this machine
        self._stream: torch.cuda.Stream | None = None
        self._pinned: list[Tensor] = []
        self._pins = True  # False after it failed

    def told(self) -> Told:
        """For `begin` and `end` of every rank."""
        return _machine(), {slots[0].name: memory.file for slots, memory in self._buckets if memory}

    def begin(self, ranks: Sequence[Told], rank: int) -> None:
        """Of a push: what was told by all ranks, of which this is one. New buckets are shared out from now on."""
        near = [other for other, (machine, _) in enumerate(ranks) if machine == ranks[rank][0]]
        self._index, self._num_ranks = near.index(rank), len(near)
        self.awaits_others = self._is_kept and self._num_ranks > 1

    def end(self, ranks: Sequence[Told]) -> None:
        """Of a push that went well on every rank."""
        self._files = {name: file for machine, files in ranks if machine == _machine() for name, file in files.items()}
        self.awaits_others = False

    def keep(self, bucket: Bucket) -> None:
        """Copy a bucket's weights, over their earlier values, if they are this rank's to keep; up to `finish` they must
        stay as they are, unless written on the current stream after the next `keep`. Raises OSError without memory."""
        if not self._is_kept:
            return
        filled_B = bucket.filled
        new = [slot for slot in bucket.slots if slot.name not in self._places]
        if new:
            self._make_room(new, filled_B.device)
        with self._beside(filled_B.device):
            for slot in bucket.slots:
                memory, kept = self._places[slot.name]
                if memory:
                    kept_B = memory.bytes_B[kept.start : kept.stop]
                    kept_B.copy_(filled_B[slot.start : slot.stop], non_blocking=True)

    def finish(self) -> None:
        """Wait until everything is copied."""
        if self._stream:
            self._stream.synchronize()

    def all(self) -> list[Bucket]:
        """Every weight. Raises RunError when they are not there: not kept, being written, or gone with another rank."""
        if not self._is_kept:
            raise RunError(
                "a worker was lost and there is no copy of the weights to start another one with "
                "(rollout.sglang.keep_host_copy is false): set it to true, and resume the run from its last checkpoint"
            )
        if self.awaits_others:
            raise RunError(
                "a worker was lost, and the last push of weights failed on another rank of this machine, which keeps a "
                "part of them: resume the run from its last checkpoint"
            )
        try:
            return [Bucket(memory or _Borrowed(self._files[slots[0].name]), slots) for slots, memory in self._buckets]
        except OSError as error:
            raise RunError(
                "a worker was lost, and so is the part of the weights that another rank of this machine kept "
                f"({error}): resume the run from its last checkpoint"
            ) from None

    def close(self) -> None:
        """Give the memory back."""
        cudart: Any = torch.cuda.cudart() if self._pinned else None
        for flat_B in self._pinned:
            cudart.cudaHostUnregister(flat_B.data_ptr())
        self._pinned, self._buckets, self._places = [], [], {}

    def _make_room(self, slots: Sequence[Slot], device: torch.device) -> None:
        """The next bucket, for weights that were not here before."""
        num_bytes, moved = 0, list[Slot]()
        for slot in slots:
            moved.append(replace(slot, start=num_bytes, stop=num_bytes + slot.stop - slot.start))
            num_bytes = moved[-1].stop
        memory = SharedBytes(num_bytes) if len(self._buckets) % self._num_ranks == self._index else None
        self._buckets.append((tuple(moved), memory))
        self._places |= {slot.name: (memory, slot) for slot in moved}
        if memory and device.type == "cuda" and self._pins:
            self._pin(memory.bytes_B, device)

    def _pin(self, flat_B: Tensor, device: torch.device) -> None:
        """So that a copy from a GPU goes at the link's speed and takes no core's time. Untested: it needs a GPU."""
        cudart: Any = torch.cuda.cudart()
        failure = int(cudart.cudaHostRegister(flat_B.data_ptr(), flat_B.numel(), 0))
        if failure == 0:
            return self._pinned.append(flat_B)
        self._pins = False
        print(f"the copy of the weights in host memory is not pinned: CUDA error {failure}", file=sys.stderr)
        with contextlib.suppress(RuntimeError):  # CUDA tells the last error once more, to the next kernel's launch
            torch.ones(1, device=device)

    def _beside(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A stream for copies from a GPU, beside the gathering of the next bucket. Untested, as `_pin`."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._stream)  # for the bucket before this one, whose memory the next one is written to
        self._stream.wait_stream(current)
        return torch.cuda.stream(self._stream)


class _Borrowed(SharedBytes):
    """Memory of another process, which gives it back."""

    def __init__(self, file: File) -> None:
        self._file, self.descriptor = file, -1
        self.bytes_B = mapped(*file)

    @property
    def file(self) -> File:
        return self._file


def _machine() -> str:
    """The same for processes that can open each other's memory by process and descriptor."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
