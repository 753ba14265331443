"""Groups from the rank that drew them to the rank that trains on them, as bytes.

Everything goes over gloo, on the CPU. What arrives is what was sent, bit for bit, and lies on the same kind of device.
Pixels go as bytes where that is exact (video/pixel_bytes.py), a quarter of float32; embeddings of a frozen tower go
instead of pixels. Called by `learner/step.py`, on all ranks alike.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vcr1_fast.learner.sharding import World, all_reduce_sum
from vcr1_fast.types import RolloutGroup
from vcr1_fast.video.pixel_bytes import pack, unpack


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
    return {**groups, **{g: from_bytes(b) for g, b in zip(coming, arrived, strict=True)}}


def to_bytes(group: RolloutGroup) -> Tensor:
    """[num_bytes] uint8: a pickle, because both ends are ranks of one run, as in torch's own object collectives."""
    file = io.BytesIO()
    _GroupPickler(file, [patches.values_PC for patches in group.prompt.media]).dump(group)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def from_bytes(bytes_B: Tensor) -> RolloutGroup:
    """What `to_bytes` was given; tensors that were on a GPU come to this rank's."""
    return pickle.loads(bytes_B.numpy().data)


class _GroupPickler(pickle.Pickler):
    """Of a tensor, wherever it is in the group, the bytes that it shows and no more."""

    def __init__(self, file: io.BytesIO, pixels: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._pixels = pixels

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        parts = {"values_PC": obj}
        if any(obj is values_PC for values_PC in self._pixels):
            parts = pack(parts)
        return _tensor_of, ({name: _as_bytes(part) for name, part in parts.items()}, obj.device.type != "cpu")


def _as_bytes(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, tuple[int, ...]]:
    chunk_B = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return chunk_B.numpy(), tensor.dtype, tuple(tensor.shape)


def _tensor_of(parts: Mapping[str, tuple[np.ndarray, torch.dtype, tuple[int, ...]]], is_on_gpu: bool) -> Tensor:
    made = {name: torch.from_numpy(array).view(dtype).view(shape) for name, (array, dtype, shape) in parts.items()}
    tensor = unpack(made)["values_PC"]
    return tensor.cuda() if is_on_gpu else tensor
