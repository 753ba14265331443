"""How many bytes the tensors of a device take at most while something runs; on `meta`, at real sizes without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts a storage from the op that makes it to the moment its last tensor is gone, as an allocator does.

    What existed before, and mapped files, are none. `loops`: ops that are to be taken apart, by name.
    """

    def __init__(
        self, device: str | torch.device = "cpu", loops: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._device, self._loops = torch.device(device), loops
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps its address from reuse

    def _see(self, value: Any, is_new: bool) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor | UntypedStorage) and leaf.device == self._device:
                storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else leaf
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes() if is_new else 0))

    def live_bytes(self) -> int:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its own operations on the local tensors come by
        kwargs = kwargs or {}
        self._see((args, kwargs), is_new=False)
        loop = self._loops.get(func._schema.name.split("::")[-1])
        if loop is not None:
            with self:
                return loop(*args, **kwargs)
        result = func(*args, **kwargs)
        self._see(result, is_new=True)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result
