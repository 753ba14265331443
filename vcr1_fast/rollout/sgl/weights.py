"""The weights an SGLang worker gets: checked, and laid one after the other into buckets of bytes.

In: `(name, tensor)` pairs under checkpoint names. Out: buckets, each of one dtype and without gaps, because
SGLang lays the buckets that it receives by broadcast out in that way. delivery.py brings them to the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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


class WeightTable:
    """Which weights an engine has, and whether it has all of them in one version."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.is_named = False  # the first load came to its end: its names are all there are
        self.is_whole = False  # False before the first load, and after one that broke off: versions may then be mixed

    def forget(self) -> None:
        """The engine's weights are gone; the next load must be whole."""
        self.is_whole = False

    def checked(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """`weights` as they come.

        The first load names every weight, later ones may leave out what did not change. Raises ValueError for a weight
        that is new later, comes twice, or has another shape, and at the end for one that is missing; the next load must
        then be whole again.
        """
        must_be_whole, self.is_whole = self.is_named and not self.is_whole, False
        if not self.is_named:
            self._shapes = {}
        came: set[str] = set()
        for name, value in weights:
            shape = tuple(value.shape)
            if name in came:
                raise ValueError(f"weight {name!r} was given twice")
            if self.is_named and name not in self._shapes:
                raise ValueError(f"weight {name!r} was not among the first ones: send the same names each time")
            if self._shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"weight {name!r} has shape {shape}, wanted {self._shapes[name]}: send whole tensors of the "
                    "same architecture"
                )
            came.add(name)
            yield name, value
        num_missing = len(self._shapes) - len(came)
        if not came or (must_be_whole and num_missing):
            raise ValueError(
                f"{num_missing} weights are missing: the load after an error or a release of memory must name every "
                "weight, and no load may be empty"
            )
        self.is_named = self.is_whole = True


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

    def as_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "dtype": dtype, "shape": self.shape, "start": self.start, "stop": self.stop}


@dataclass(frozen=True, slots=True)
class Batch:
    """Weights of one bucket that go out together."""

    flat_B: Tensor  # uint8
    slots: tuple[Slot, ...]
    memory: SharedBytes | None = None  # what flat_B lies in, where other processes can open it

    def entries(self, with_checksums: bool) -> list[dict[str, Any]]:
        """As JSON; with checksums the worker compares what it holds afterwards."""
        if not with_checksums:
            return [slot.as_json() for slot in self.slots]
        return [slot.as_json() | {"checksum": checksum(slot.of(self.flat_B))} for slot in self.slots]


def sent_dtype(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Floating weights are cast to `dtype`, others stay."""
    return dtype if value.is_floating_point() else value.dtype


def in_batches(weights: Weights, bucket_bytes: int, dtype: torch.dtype) -> Iterator[tuple[Batch, bool]]:
    """Fill two buckets on the weights' device in turn, with whether each batch is the last one.

    A batch's bytes are good until the next but one is asked for. A weight larger than `bucket_bytes` gets a bucket of
    its own size. Weights are on one device.
    """
    buffers: list[Tensor] = []
    slots: list[Slot] = []
    for name, value in weights:
        wanted = sent_dtype(value, dtype)
        num_bytes = value.numel() * wanted.itemsize
        used = slots[-1].stop if slots else 0
        if slots and (used + num_bytes > bucket_bytes or wanted != slots[-1].dtype):
            yield Batch(buffers[-1][:used], tuple(slots)), False
            slots, used = [], 0
        if not slots:
            free = buffers.pop(0) if len(buffers) == 2 else None
            size = max(num_bytes, bucket_bytes)
            if free is None or free.numel() < size:
                free = torch.empty(size, dtype=torch.uint8, device=value.device)
            buffers.append(free)
        slot = Slot(name, wanted, tuple(value.shape), used, used + num_bytes)
        slot.of(buffers[-1]).copy_(value.detach())
        slots.append(slot)
    if slots:
        yield Batch(buffers[-1][: slots[-1].stop], tuple(slots)), True


@dataclass
class _Bucket:
    memory: SharedBytes
    slots: dict[str, Slot] = field(default_factory=dict)
    num_bytes: int = 0  # used so far


class WeightStore:
    """All weights of the policy in host memory, which a worker of the same machine can open: 15 GB for 7 billion
    weights in bfloat16. `update` fills it, `all` gives everything to a new worker.
    """

    def __init__(self, bucket_bytes: int, dtype: torch.dtype) -> None:
        """`dtype`: floating weights are cast to it. A weight larger than `bucket_bytes` gets a bucket of its own."""
        self._bucket_bytes, self._dtype = bucket_bytes, dtype
        self._buckets: list[_Bucket] = []
        self._home: dict[str, _Bucket] = {}

    def all(self) -> list[Batch]:
        """Every bucket with all its weights."""
        return [Batch(bucket.memory.bytes_B, tuple(bucket.slots.values()), bucket.memory) for bucket in self._buckets]

    def place(self, name: str, value: Tensor) -> None:
        """Copy one weight in, over its earlier value. Raises ValueError when that had another size."""
        bucket = self._home.get(name) or self._with_room_for(name, value)
        bucket.slots[name].of(bucket.memory.bytes_B).copy_(value.detach())

    def update(self, weights: Weights) -> list[Batch]:
        """Copy the weights in; gives the buckets that changed, each with those of its weights that came."""
        came: set[str] = set()
        for name, value in weights:
            self.place(name, value)
            came.add(name)
        changed = [
            Batch(batch.flat_B, tuple(slot for slot in batch.slots if slot.name in came), batch.memory)
            for batch in self.all()
        ]
        return [batch for batch in changed if batch.slots]

    def close(self) -> None:
        """Give the memory back."""
        for bucket in self._buckets:
            bucket.memory.close()
        self._buckets, self._home = [], {}

    def _with_room_for(self, name: str, value: Tensor) -> _Bucket:
        dtype = sent_dtype(value, self._dtype)
        size = value.numel() * dtype.itemsize
        bucket = self._buckets[-1] if self._buckets else None
        is_full = bucket is None or bucket.num_bytes + size > bucket.memory.bytes_B.numel()
        if bucket is None or is_full or next(iter(bucket.slots.values())).dtype != dtype:
            bucket = _Bucket(SharedBytes(max(size, self._bucket_bytes)))
            self._buckets.append(bucket)
        bucket.slots[name] = Slot(name, dtype, tuple(value.shape), bucket.num_bytes, bucket.num_bytes + size)
        bucket.num_bytes += size
        self._home[name] = bucket
        return bucket
