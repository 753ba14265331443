"""Tensors of a run -> the safetensors files that this rank writes of them, as heads and tensors, not yet copied.

torch.distributed.checkpoint plans which rank writes which part (each shard once, however it is replicated), and reads
the files again: they are those of its HuggingFaceStorageWriter, which itself would hold a whole file in memory before
it writes. Called by the checkpoint code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from vcr1_fast.learner.sharding import World, all_max_int

FILE_BYTES = 2 << 30  # of a shard file at most, unless one tensor is larger: several are written and read at once
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Offsets = tuple[int, ...]  # of a shard's first element in the whole tensor


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: 8 bytes with the length of a JSON text, that text, and the tensors' bytes."""

    name: str  # below the checkpoint's folder
    head: bytes
    tensors: Sequence[Tensor]  # flat bytes, on their device

    @property
    def num_bytes(self) -> int:
        return len(self.head) + sum(tensor.numel() for tensor in self.tensors)

    def parts(self) -> Iterator[memoryview]:
        """All bytes, one tensor at a time on the host."""
        yield memoryview(self.head)
        for tensor in self.tensors:
            yield tensor.cpu().numpy().data


def tensor_file(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> TensorFile:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    flat, offset = [], 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that each is aligned
        num_bytes = tensor.numel() * tensor.element_size()
        where = [offset, offset + num_bytes]
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": where}
        flat.append(tensor.detach().contiguous().flatten().view(torch.uint8))
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return TensorFile(name, struct.pack("<Q", len(text)) + text, flat)


@dataclass
class ShardPlan:
    """Which tensors this rank writes. Made anew only when names or shapes have changed on any rank: for a 7B model it
    takes longer than the copy of the weights."""

    _planned_for: object = None
    _mine: Sequence[tuple[str, Offsets]] = field(default_factory=tuple)

    def files(self, tensors: dict[str, Tensor], folder: Path, world: World) -> list[TensorFile]:
        """A collective. `folder` must be there on all ranks."""
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if all_max_int(shapes != self._planned_for, world):
            listing = _Listing(str(folder), save_distributed=True)
            dcp_save(tensors, storage_writer=listing, no_dist=world.world_size == 1)
            self._planned_for, self._mine = shapes, listing.mine
        groups: list[dict[str, Offsets]] = [{}]
        filled_bytes = 0
        for name, offsets in self._mine:
            num_bytes = local_part(tensors[name]).numel() * tensors[name].element_size()
            if filled_bytes and filled_bytes + num_bytes > FILE_BYTES:
                groups.append({})
                filled_bytes = 0
            groups[-1][name] = offsets
            filled_bytes += num_bytes
        return [
            _shard_file(f"shard-{world.rank + 1:05d}-{number:05d}.safetensors", group, tensors)
            for number, group in enumerate(groups, start=1)
            if group
        ]


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_file(name: str, group: Mapping[str, Offsets], tensors: Mapping[str, Tensor]) -> TensorFile:
    where = {fqn: {"saved_offsets": list(offsets)} for fqn, offsets in group.items()}
    # the names that HuggingFaceStorageReader looks for
    metadata = {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}
    return tensor_file(name, {fqn: local_part(tensors[fqn]) for fqn in group}, metadata)


class _Listing(HuggingFaceStorageWriter):
    """Notes what this rank is to write, and writes nothing."""

    mine: Sequence[tuple[str, Offsets]] = ()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        del planner
        parts = [(item.index.fqn, item.tensor_data) for item in plan.items]
        self.mine = [(fqn, tuple(part.chunk.offsets)) for fqn, part in parts if part is not None]
        future: Future[list[WriteResult]] = Future()
        future.set_result([])
        return future
