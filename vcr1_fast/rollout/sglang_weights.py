"""The weights an SGLang worker gets: checkpoint names, in buckets of shared memory that outlive the worker.

`SGLangEngine` keeps one `WeightStore`: a worker that died is fed again from it, without the learner. It holds every
weight once in host memory, in the engine's precision (15 GB for 7 billion weights in bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vcr1_fast.rollout.sglang_messages import SharedBytes

# transformers 5 names the parts of the model by its modules, the published checkpoints and SGLang by these.
RENAMED = {"model.visual.": "visual.", "model.language_model.": "model."}
_ALIGN_BYTES = 16  # a weight must start at a multiple of its item size


def checkpoint_name(name: str) -> str:
    """A weight's name in the published checkpoints, from its name in the model's state dict (or that name itself)."""
    for prefix, replacement in RENAMED.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one weight lies in its bucket, bytes [start, stop)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def as_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "dtype": dtype, "shape": self.shape, "start": self.start, "stop": self.stop}


@dataclass
class Bucket:
    """Some weights, one after the other."""

    memory: SharedBytes
    slots: dict[str, Slot] = field(default_factory=dict)
    num_bytes: int = 0  # used so far

    def place(self, slot: Slot, value: Tensor) -> None:
        self.memory.bytes_B[slot.start : slot.stop].view(slot.dtype).copy_(value.detach().reshape(-1))


Batch = tuple[Bucket, list[Slot]]


class WeightStore:
    """All weights of the policy. `update` fills it, `all` gives everything to a new worker."""

    def __init__(self, bucket_bytes: int, dtype: torch.dtype) -> None:
        """`dtype`: floating weights are cast to it. A weight larger than `bucket_bytes` gets a bucket of its own."""
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._buckets: list[Bucket] = []
        self._home: dict[str, Bucket] = {}
        self._has_all_names = self._is_whole = False

    @property
    def is_whole(self) -> bool:
        """False before the first update, and after one that broke off: weights of two versions may then be mixed."""
        return self._is_whole

    def all(self) -> list[Batch]:
        """Every bucket with all its weights. Raises RuntimeError when the store is not whole."""
        if not self._is_whole:
            raise RuntimeError("the engine has no whole set of weights: load_weights must give every weight first")
        return [(bucket, list(bucket.slots.values())) for bucket in self._buckets]

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> list[Batch]:
        """Copy the weights in; gives the buckets that changed, each with those of its weights that came.

        The first update names every weight; later ones may leave out what did not change. Raises ValueError for a
        weight that is new later, comes twice, or has another shape; the next update must then be whole again.
        """
        is_first, must_be_whole = not self._has_all_names, self._has_all_names and not self._is_whole
        self._is_whole = False
        if is_first:
            self.close()
        came: dict[str, None] = {}
        for given_name, value in weights:
            name = checkpoint_name(given_name)
            if name in came:
                raise ValueError(f"weight {given_name!r} was given twice")
            bucket = self._bucket_of(name, value, is_first)
            if bucket.slots[name].shape != tuple(value.shape):
                raise ValueError(
                    f"weight {given_name!r} has shape {tuple(value.shape)}, wanted {bucket.slots[name].shape}: send "
                    "whole tensors of the same architecture"
                )
            bucket.place(bucket.slots[name], value)
            came[name] = None
        missing = [name for name in self._home if name not in came]
        if not came or (must_be_whole and missing):
            raise ValueError(
                f"{len(missing)} weights are missing: the load after an error must name every weight, and no load may "
                "be empty"
            )
        self._has_all_names = self._is_whole = True
        changed = [(bucket, [slot for name, slot in bucket.slots.items() if name in came]) for bucket in self._buckets]
        return [(bucket, slots) for bucket, slots in changed if slots]

    def close(self) -> None:
        """Give the memory back."""
        for bucket in self._buckets:
            bucket.memory.close()
        self._buckets, self._home = [], {}
        self._has_all_names = self._is_whole = False

    def _bucket_of(self, name: str, value: Tensor, is_first: bool) -> Bucket:
        if name in self._home:
            return self._home[name]
        if not is_first:
            raise ValueError(f"weight {name!r} was not among the first ones: send the same names each time")
        dtype = self._dtype if value.is_floating_point() else value.dtype
        size = value.numel() * dtype.itemsize
        bucket = self._buckets[-1] if self._buckets else None
        if bucket is None or bucket.num_bytes + size > bucket.memory.bytes_B.numel():
            bucket = Bucket(SharedBytes(max(size, self._bucket_bytes)))
            self._buckets.append(bucket)
        slot = Slot(name, dtype, tuple(value.shape), bucket.num_bytes, bucket.num_bytes + size)
        bucket.slots[name] = slot
        bucket.num_bytes = -(-slot.stop // _ALIGN_BYTES) * _ALIGN_BYTES
        self._home[name] = bucket
        return bucket


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face folder, one at a time. Raises FileNotFoundError without safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
