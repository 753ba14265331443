"""How much memory tensors of the CPU take at most while something runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations make inside of it; mapped files and tensors from before are none."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its own operations on the local tensors come by
        given = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor | UntypedStorage)}
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and storage_key(leaf) not in given:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def storage_key(memory: Tensor | UntypedStorage) -> int:
    return memory.untyped_storage()._cdata if isinstance(memory, Tensor) else memory._cdata


def held_bytes(module: nn.Module) -> int:
    """Of this rank's parts of all weights."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(p.nbytes for p in local)
