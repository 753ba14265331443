"""Groups from the rank that drew them to the rank that trains on them: sizes to all ranks, bytes to where they are run.

Everything goes over gloo, on the CPU. What arrives is what was sent, bit for bit, and lies on the same kind of device.
Pixels go as bytes where that is exact (video/pixel_bytes.py), a quarter of float32; embeddings of a frozen tower go
instead of pixels. Called by `learner/step.py`, on all ranks alike.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcr1_fast.learner.row_cost import GroupSize
from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.types import RolloutGroup
from vcr1_fast.video.pixel_bytes import pack, unpack

_LENGTH_BYTES = 8


def gather_sizes(sizes: Sequence[GroupSize], world: World) -> list[list[GroupSize]]:
    """Of each rank's groups, on every rank. A collective."""
    if world.world_size == 1:
        return [list(sizes)]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, list(sizes))
    return gathered


def exchange(
    groups: Mapping[int, RolloutGroup], homes: Sequence[int], rank_of: Mapping[int, int], world: World
) -> dict[int, RolloutGroup]:
    """This rank's `groups`, and those that come to it. A collective if any group leaves its rank.

    Args:
        groups: this rank's, by global index.
        homes: rank that has each group, of all ranks.
        rank_of: rank that runs a group, of all that are run; the same on every rank.
    """
    moved = sorted(group for group, rank in rank_of.items() if rank != homes[group])
    if not moved:
        return dict(groups)
    routes = {g: (homes[g], rank_of[g]) for g in moved}
    leaving = sorted((g for g in moved if homes[g] == world.rank), key=lambda g: (rank_of[g], g))
    coming = sorted((g for g in moved if rank_of[g] == world.rank), key=lambda g: (homes[g], g))
    sent = {g: to_bytes(groups[g]) for g in leaving}
    num_bytes_M = torch.tensor([sent[g].numel() if g in sent else 0 for g in moved])
    num_bytes = dict(zip(moved, all_reduce_sum(num_bytes_M, world).tolist(), strict=True))

    def bytes_between(source: int, target: int) -> int:
        return sum(num_bytes[g] for g in moved if routes[g] == (source, target))

    ranks = range(world.world_size)
    received = torch.empty(sum(num_bytes[g] for g in coming), dtype=torch.uint8)
    dist.all_to_all_single(
        received,
        torch.cat([torch.empty(0, dtype=torch.uint8), *sent.values()]),
        [bytes_between(source, world.rank) for source in ranks],
        [bytes_between(world.rank, target) for target in ranks],
    )
    arrived = received.split([num_bytes[g] for g in coming])
    return {**groups, **{g: from_bytes(b, world.device) for g, b in zip(coming, arrived, strict=True)}}


def to_bytes(group: RolloutGroup) -> Tensor:
    """[num_bytes] uint8: length of the pickle, the pickle of everything but tensors, and the tensors one by one.

    Pickle, because both ends are ranks of one run, as in torch's own object collectives.
    """
    file = io.BytesIO()
    pickler = _GroupPickler(file, [patches.values_PC for patches in group.prompt.media])
    pickler.dump(group)
    head = file.getvalue()
    length = len(head).to_bytes(_LENGTH_BYTES, "little")
    return torch.cat([torch.frombuffer(bytearray(length + head), dtype=torch.uint8), *pickler.chunks])


def from_bytes(bytes_B: Tensor, device: torch.device) -> RolloutGroup:
    """What `to_bytes` was given; tensors that were on a GPU come to `device`."""
    length = int.from_bytes(bytes_B[:_LENGTH_BYTES].numpy().tobytes(), "little")
    head, body_B = bytes_B[_LENGTH_BYTES:].split([length, bytes_B.numel() - _LENGTH_BYTES - length])
    return _GroupUnpickler(io.BytesIO(head.numpy().tobytes()), body_B, device).load()


class _GroupPickler(pickle.Pickler):
    """Takes tensors out, wherever they are in the group; in their place the pickle says where their bytes are."""

    def __init__(self, file: io.BytesIO, pixels: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.chunks: list[Tensor] = []
        self._pixels = pixels
        self._num_bytes = 0

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        parts = {"values_PC": obj}
        if any(obj is values_PC for values_PC in self._pixels):
            parts = pack(parts)
        return obj.device.type != "cpu", {name: self._keep(part) for name, part in parts.items()}

    def _keep(self, tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        """dtype, shape, and the bytes from where to where."""
        chunk = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.chunks.append(chunk)
        start, self._num_bytes = self._num_bytes, self._num_bytes + chunk.numel()
        return tensor.dtype, tuple(tensor.shape), start, self._num_bytes


class _GroupUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, body_B: Tensor, device: torch.device) -> None:
        super().__init__(file)
        self._body_B, self._device = body_B, device

    def persistent_load(self, pid: Any) -> Tensor:
        is_on_gpu, parts = pid
        tensor = unpack({name: self._part(*part) for name, part in parts.items()})["values_PC"]
        return tensor.to(self._device) if is_on_gpu else tensor

    def _part(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """A copy, so that what was received is freed, and numbers lie at multiples of their size."""
        return self._body_B[start:stop].clone().view(dtype).view(shape)
