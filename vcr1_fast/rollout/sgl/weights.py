"""The weights an SGLang worker gets, laid one after the other into buckets of bytes.

In: `(name, tensor)` pairs under checkpoint names. Out: buckets, each of one dtype and without gaps, because
SGLang lays the buckets that it receives by broadcast out in that way. Called by delivery.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.check import checksum
from vcr1_fast.rollout.sgl.messages import SharedBytes
from vcr1_fast.run.model_folder import weight_files

Weights = Iterable[tuple[str, Tensor]]


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face folder, one at a time. Raises ConfigError as `weight_files` does."""
    for path in weight_files(folder):
        with safetensors.safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one weight lies in its bucket, bytes [start, stop)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def of(self, flat_B: Tensor) -> Tensor:
        """The weight, as a view of its bucket's bytes."""
        return flat_B[self.start : self.stop].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Weights that go out together."""

    memory: Tensor | SharedBytes  # [num_bytes] uint8; other processes can open the latter
    slots: tuple[Slot, ...]

    @property
    def filled(self) -> Tensor:
        """The bytes of its weights, without the room behind them."""
        return bytes_of(self.memory)[: self.slots[-1].stop]

    def entries(self, with_checksums: bool) -> list[dict[str, Any]]:
        """As JSON; with checksums the worker compares what it holds afterwards."""
        entries = [asdict(slot) | {"dtype": str(slot.dtype).removeprefix("torch.")} for slot in self.slots]
        if with_checksums:
            for slot, entry in zip(self.slots, entries, strict=True):
                entry["checksum"] = checksum(slot.of(self.filled))
        return entries


def in_buckets(
    weights: Weights, bucket_bytes: int, dtype: torch.dtype, shared: list[SharedBytes] | None = None
) -> Iterator[tuple[Bucket, bool]]:
    """Fill two buckets in turn, with whether each is the last one. Floating weights are cast to `dtype`.

    Each is good until the next but one is asked for. They are on the weights' device, which is one, or in `shared`,
    memory of an earlier call, which gets what it lacks: new pages for 262 MB took 0.2 s, copying as much 0.02 s.
    A weight larger than `bucket_bytes` gets a bucket of its own size.
    """
    memories: list[Any] = [] if shared is None else shared  # the last two
    slots: list[Slot] = []
    for name, value in weights:
        wanted = dtype if value.is_floating_point() else value.dtype
        num_bytes = value.numel() * wanted.itemsize
        used = slots[-1].stop if slots else 0
        if slots and (used + num_bytes > bucket_bytes or wanted != slots[-1].dtype):
            yield Bucket(memories[-1], tuple(slots)), False
            slots, used = [], 0
        if not slots:
            free = memories.pop(0) if len(memories) == 2 else None
            size = max(num_bytes, bucket_bytes)
            if free is None or bytes_of(free).numel() < size:
                is_shared = shared is not None
                free = SharedBytes(size) if is_shared else torch.empty(size, dtype=torch.uint8, device=value.device)
            memories.append(free)
        slots.append(Slot(name, wanted, tuple(value.shape), used, used + num_bytes))
        slots[-1].of(bytes_of(memories[-1])).copy_(value.detach())
    if slots:
        yield Bucket(memories[-1], tuple(slots)), True


def bytes_of(memory: Tensor | SharedBytes) -> Tensor:
    return memory.bytes_B if isinstance(memory, SharedBytes) else memory
