"""Bytes of the fake GPU's storages that are alive, their peak, and what kind they were when it was reached."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Peak:
    """The most bytes that were alive at once, and what they were."""

    num_bytes: int
    kinds: Counter[str]


class Memory:
    """Follows every storage from the first tensor seen on it to its end, resizes included."""

    def __init__(self) -> None:
        self.kind = "other"  # of what is allocated from now on
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}  # of each phase
        self._peak = Peak(0, Counter())
        self.now_bytes = 0
        self._known: dict[int, _Entry] = {}

    def see(self, tensor: Tensor) -> None:
        """Take in a tensor on the fake GPU, new or not."""
        storage = tensor.untyped_storage()
        entry = self._known.get(id(storage))
        if entry is not None and entry.reference() is storage:
            self.resized(storage)
            return
        key = id(storage)
        entry = _Entry(weakref.ref(storage, lambda _: self._gone(key)), storage.nbytes(), _sharding_kind() or self.kind)
        self._known[key] = entry
        self._add(entry.num_bytes, entry.kind)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """To be called after a storage was resized in place: FSDP frees what it gathered so."""
        entry = self._known.get(id(storage))
        if entry is None or entry.reference() is not storage or entry.num_bytes == storage.nbytes():
            return
        self._add(storage.nbytes() - entry.num_bytes, entry.kind)
        entry.num_bytes = storage.nbytes()

    def mark(self, tensor: Tensor, kind: str) -> None:
        """What this tensor is, known only after it was made."""
        entry = self._known.get(id(tensor.untyped_storage()))
        if entry is not None:
            self.live[entry.kind] -= entry.num_bytes
            self.live[kind] += entry.num_bytes
            entry.kind = kind

    def enter(self, phase: str) -> None:
        """What follows belongs to this phase; its peak is over all its parts."""
        self._peak = self.peaks.setdefault(phase, Peak(0, Counter()))
        self._add(0, self.kind)

    def _gone(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None:
            self._add(-entry.num_bytes, entry.kind)

    def _add(self, num_bytes: int, kind: str) -> None:
        self.now_bytes += num_bytes
        self.live[kind] += num_bytes
        if self.now_bytes > self._peak.num_bytes:
            self._peak.num_bytes, self._peak.kinds = self.now_bytes, Counter(self.live)


def _sharding_kind() -> str | None:
    """What FSDP makes: it allocates between operations of the product, so only the code that runs tells."""
    frame = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return None
        if frame.f_code.co_filename.endswith(("_fsdp_collectives.py", "_fsdp_param.py")):
            name = frame.f_code.co_name
            return "gradients" if "reduce" in name or "accumul" in name else "gathered"
        frame = frame.f_back
    return None


@dataclass(slots=True)
class _Entry:
    reference: weakref.ref[Any]
    num_bytes: int
    kind: str
