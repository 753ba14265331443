"""Peak of the bytes that tensors on the `meta` device would hold, at real sizes and without any memory.

Counted as an allocator sees it: a storage from the op that makes it to the moment its last tensor is gone. What existed
before, the inputs, does not count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.device_traffic import DEVICE, LOOPS


class LiveBytes(TorchDispatchMode):
    """`peak_bytes` is the most that was alive after any op."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps its address from reuse

    def _see(self, value: Any, is_new: bool) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes() if is_new else 0))

    def live_bytes(self) -> int:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), is_new=False)
        loop = LOOPS.get(func._schema.name.split("::")[-1])
        if loop is not None:
            with self:
                return loop(*args, **kwargs)
        result = func(*args, **kwargs)
        self._see(result, is_new=True)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result
