"""The weights an SGLang worker gets: checked, and laid one after the other into buckets of bytes.

In: `(name, tensor)` pairs under checkpoint names. Out: buckets, each of one dtype and without gaps, because
SGLang lays the buckets that it receives by broadcast out in that way. delivery.py brings them to the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((slot.name, slot.of(self.flat_B)) for slot in self.slots)

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


class WeightStore:
    """All weights of the policy in host memory, which a worker of the same machine can open: 15 GB for 7 billion
    weights in bfloat16. `update` fills it, `all` gives everything to a new worker.
    """

    def __init__(self, bucket_bytes: int, dtype: torch.dtype) -> None:
        """`dtype`: floating weights are cast to it. A weight larger than `bucket_bytes` gets a bucket of its own."""
        self._bucket_bytes, self._dtype = bucket_bytes, dtype
        self._buckets: list[tuple[SharedBytes, dict[str, Slot]]] = []

    def all(self) -> list[Batch]:
        """Every bucket with all its weights."""
        return [Batch(memory.bytes_B, tuple(slots.values()), memory) for memory, slots in self._buckets]

    def update(self, weights: Weights) -> list[Batch]:
        """Copy weights in, over their earlier values; gives the buckets that changed, each with those of its weights
        that came. Raises RuntimeError when a weight had another size."""
        came: set[str] = set()
        for name, value in weights:
            memory, slots = next((each for each in self._buckets if name in each[1]), None) or self._room(name, value)
            slots[name].of(memory.bytes_B).copy_(value.detach())
            came.add(name)
        changed = [replace(each, slots=tuple(slot for slot in each.slots if slot.name in came)) for each in self.all()]
        return [batch for batch in changed if batch.slots]

    def close(self) -> None:
        """Give the memory back."""
        for memory, _ in self._buckets:
            memory.close()
        self._buckets = []

    def _room(self, name: str, value: Tensor) -> tuple[SharedBytes, dict[str, Slot]]:
        """A bucket with a slot for a new weight."""
        dtype = sent_dtype(value, self._dtype)
        size, start = value.numel() * dtype.itemsize, 0
        if self._buckets:
            memory, slots = self._buckets[-1]
            last = next(reversed(slots.values()))
            start = last.stop if last.dtype == dtype and last.stop + size <= memory.bytes_B.numel() else 0
        if start == 0:
            self._buckets.append((SharedBytes(max(size, self._bucket_bytes)), {}))
        self._buckets[-1][1][name] = Slot(name, dtype, tuple(value.shape), start, start + size)
        return self._buckets[-1]
