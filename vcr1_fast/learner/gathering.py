"""Weights split over the ranks -> whole ones on every rank, many in one collective.

In: weights in the same order on every rank, divided by FSDP2 along dimension 0, over each row of the mesh, or not at
all. Out: each of them whole, in that order, one at a time. Called by the weight sync and by export; lora.py adds
adapters to their matrices here.

Layout. Rank r of the N of a row has the rows [r c, (r + 1) c) of a weight of R rows, c = ceil(R / N); the last may have
fewer, or none. A bucket holds a block of equal size for each rank, with room for c rows of each of its weights:

    [ rank 0: c_0 rows of weight 0 | c_1 rows of weight 1 | ... ][ rank 1: ... ] ...

Sizes follow from the shapes, so ranks agree on them without a word, and one all-gather fills the bucket in place. Rows
are cast where they are copied in, that is before they travel.

Memory beside the shards, at most twice the larger of BUCKET_BYTES and the largest weight: one bucket, and one buffer
for the weight that is handed over. Qwen2.5-VL-7B in bfloat16: 1.25 + 1.09 GB, 14 collectives. With adapters the A
of a bucket, 1 % of it at rank 32, and twice a matrix's rows of this rank, in float32, while its sum is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vcr1_fast.learner.sharding import whole_tensor

BUCKET_BYTES = 1_250_000_000
_ALIGN_BYTES = 16  # of a weight in its block: rows of any dtype can begin there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it


@dataclass(frozen=True, slots=True)
class Part:
    """One weight to be made whole."""

    name: str
    weight: Tensor  # whose shape and division it has
    dtype: torch.dtype  # that it is handed over in
    factor: Tensor | None = None  # that `rows` needs whole, such as A of an adapter
    rows: Callable[[Tensor], Tensor] | None = None  # whole `factor` -> this rank's rows; None: those of `weight`


def plan_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[range]:
    """Indices of each bucket: as many sizes in a row as fit; one that is larger than a bucket gets one of its own."""
    buckets: list[range] = []
    start = filled_bytes = 0
    for index, num_bytes in enumerate(sizes):
        if index > start and filled_bytes + num_bytes > bucket_bytes:
            buckets.append(range(start, index))
            start, filled_bytes = index, 0
        filled_bytes += num_bytes
    return [*buckets, range(start, len(sizes))] if sizes else []


def block_bytes(shape: Sequence[int], dtype: torch.dtype, num_ranks: int) -> int:
    """Room that a weight takes in the block of each rank."""
    return -(-_rows_bytes(shape, dtype, num_ranks) // _ALIGN_BYTES) * _ALIGN_BYTES


def rows_here(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, detached: its rows, or all of one that is not divided."""
    detached = weight.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


@torch.no_grad()
def whole_weights(parts: Sequence[Part], bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each part, in order. A collective when sharded: every rank takes all of them.

    A value is good until the next is asked for. One that is not divided is not copied unless it is cast.
    """
    gatherer = _Gatherer(parts, bucket_bytes)
    for bucket in gatherer.buckets:
        members = parts[bucket.start : bucket.stop]
        factors = [part.factor for part in members if part.factor is not None]
        # All A of a bucket stay while its sums are made, so they are copied out of the buffer that holds one.
        gathered = zip(factors, gatherer.gather([_piece_of(f, f.dtype) for f in factors]), strict=True)
        whole = iter([value.clone() if _is_divided(factor) else value for factor, value in gathered])
        pieces = [
            _Piece(part.weight, part.dtype, partial(part.rows, next(whole)))
            if part.rows
            else _piece_of(part.weight, part.dtype)
            for part in members
        ]
        yield from zip((part.name for part in members), gatherer.gather(pieces), strict=True)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one gather brings."""

    weight: Tensor
    dtype: torch.dtype
    rows: Callable[[], Tensor]  # of this rank; where the weight is not divided, all of them


def _piece_of(weight: Tensor, dtype: torch.dtype) -> _Piece:
    return _Piece(weight, dtype, partial(rows_here if _is_divided(weight) else whole_tensor, weight))


class _Gatherer:
    """The process group of some parts, their buckets, and the two buffers that all buckets use."""

    def __init__(self, parts: Sequence[Part], bucket_bytes: int) -> None:
        tensors = [tensor for part in parts for tensor in (part.weight, part.factor) if tensor is not None]
        divided = [tensor for tensor in tensors if isinstance(tensor, DTensor) and _is_divided(tensor)]
        self._num_ranks, self._rank, self._group = 1, 0, None
        device = torch.device("cpu")
        if divided:
            mesh, device = divided[0].device_mesh, divided[0].device
            assert all(tensor.device_mesh == mesh for tensor in divided), "weights are divided over several meshes"
            row = mesh.ndim - 1  # of a mesh with several rows each has every weight: nothing travels between them
            self._num_ranks, self._rank, self._group = mesh.size(row), mesh.get_local_rank(row), mesh.get_group(row)
        weights = [self._share(part.weight, part.dtype) for part in parts]
        factors = [0 if part.factor is None else self._share(part.factor, part.factor.dtype) for part in parts]
        sizes = [weight + factor for weight, factor in zip(weights, factors, strict=True)]
        self.buckets = plan_buckets(sizes, bucket_bytes)
        filled = [max(sum(weights[i] for i in b), sum(factors[i] for i in b)) for b in self.buckets]
        self._bucket_B = torch.empty(max(filled, default=0), dtype=torch.uint8, device=device)
        self._whole_B = torch.empty(max([*weights, *factors], default=0), dtype=torch.uint8, device=device)

    def gather(self, pieces: Sequence[_Piece]) -> Iterator[Tensor]:
        """The value of each, in order; good until the next is asked for. No more than one collective."""
        sizes = [self._share(piece.weight, piece.dtype) // self._num_ranks for piece in pieces]
        ends = list(accumulate(sizes))
        num_bytes = ends[-1] if ends else 0  # of a block
        if num_bytes:
            gathered_B = self._bucket_B[: self._num_ranks * num_bytes]
            own_B = gathered_B[self._rank * num_bytes : (self._rank + 1) * num_bytes]
            for piece, size, end in zip(pieces, sizes, ends, strict=True):
                if size:
                    _write(piece, own_B[end - size : end])
            _all_gather(gathered_B, own_B, self._group)  # in place, as FSDP2 does it
        for piece, size, end in zip(pieces, sizes, ends, strict=True):
            if not size:
                yield piece.rows().to(piece.dtype)
                continue
            shape, room = piece.weight.shape, _rows_bytes(piece.weight.shape, piece.dtype, self._num_ranks)
            blocks_NB = self._bucket_B[: self._num_ranks * num_bytes].view(self._num_ranks, num_bytes)
            whole_NB = self._whole_B[: self._num_ranks * room].view(self._num_ranks, room)
            word = torch.int64 if room % 8 == 0 else torch.uint8  # copied one by one, as the blocks lie apart
            whole_NB.view(word).copy_(blocks_NB[:, end - size : end - size + room].view(word))
            yield self._whole_B[: shape.numel() * piece.dtype.itemsize].view(piece.dtype).view(shape)

    def _share(self, tensor: Tensor, dtype: torch.dtype) -> int:
        """Bytes of a bucket that one tensor takes; 0 for one that is not divided."""
        return self._num_ranks * block_bytes(tensor.shape, dtype, self._num_ranks) if _is_divided(tensor) else 0


def _write(piece: _Piece, block_B: Tensor) -> None:
    """This rank's rows to the front of their room, cast."""
    rows = piece.rows()
    block_B[: rows.numel() * piece.dtype.itemsize].view(piece.dtype).view(rows.shape).copy_(rows)


def _rows_bytes(shape: Sequence[int], dtype: torch.dtype, num_ranks: int) -> int:
    """Of the rows that the first rank has, which has most."""
    return -(-shape[0] // num_ranks) * prod(shape[1:]) * dtype.itemsize


def _is_divided(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.placements[-1] == Shard(0)
