"""What trainer and rollout worker say to each other: a JSON header and named tensors, no pickle.

    frames    header: kind, fields, and of each tensor its name, dtype and shape | bytes of the tensors, in pieces

On one machine tensors from 64 KiB on (pixels, weights) do not travel: they lie in anonymous memory (memfd), the header
says in which process, and the receiver maps it. So nothing is copied twice, nothing has a name that could be left
behind, and the size of /dev/shm does not matter. The frames go by ZeroMQ (channel.py, endpoint.py).

Runs in the trainer and in the worker's interpreter: only the standard library and torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHARED_FROM_BYTES = 1 << 16
MAX_FRAME_BYTES = 1 << 24  # 256 MiB go at 0.5 GB/s by CURVE, in pieces of 64 MiB at 0.26; heartbeats pass between them

File = tuple[int, int, int]  # process, descriptor, inode: the last tells it from another one that got the descriptor


@dataclass(frozen=True)
class Message:
    """What was received. `fields` are JSON values."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class SharedBytes:
    """Anonymous shared memory as a tensor [num_bytes] uint8. Processes of the same user can map it until `close`."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError when the memory cannot be had."""
        self.descriptor = os.memfd_create("vcr1-tensor", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_bytes)
        self.bytes_B: Tensor = _bytes_of(self.descriptor, num_bytes, is_shared=True)

    @classmethod
    def copy_of(cls, value: Tensor) -> SharedBytes:
        """Raises OSError when there is no memory left."""
        memory = cls(value.numel() * value.element_size())
        memory.bytes_B.copy_(flat_bytes(value))
        return memory

    @property
    def file(self) -> File:
        return os.getpid(), self.descriptor, os.fstat(self.descriptor).st_ino

    def close(self) -> None:
        """Give the descriptor back; the memory stays as long as a tensor points into it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def mapped(process: int, descriptor: int, inode: int) -> Tensor:
    """All bytes of the `SharedBytes.file`; what is written into them stays in this process. Raises OSError."""
    with open(f"/proc/{int(process)}/fd/{int(descriptor)}", "rb") as file:
        if os.fstat(file.fileno()).st_ino != inode:
            raise FileNotFoundError(f"the memory that was descriptor {descriptor} of process {process} is given back")
        return _bytes_of(file.fileno(), os.fstat(file.fileno()).st_size, is_shared=False)


def _bytes_of(descriptor: int, num_bytes: int, *, is_shared: bool) -> Tensor:
    """Mapped; the tensor outlives the descriptor, and needs none of its own (mmap.mmap would keep one)."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(f"/proc/self/fd/{descriptor}", is_shared, num_bytes, dtype=torch.uint8)


def flat_bytes(value: Tensor) -> Tensor:
    """[num_bytes] uint8 on the CPU; shares the memory of a tensor that lies there in one piece."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def encode(
    kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor | SharedBytes], *, by_reference: bool = False
) -> tuple[list[memoryview], list[SharedBytes]]:
    """Frames of a message, and the memory that they refer to, which must be kept until there is an answer.

    `by_reference`: the receiver is on this machine, so that large tensors stay where they are; those that do not lie in
    shared memory are copied into it here, once.
    """
    entries: list[dict[str, Any]] = []
    pieces: list[memoryview] = []
    lent: list[SharedBytes] = []
    for name, value in tensors.items():
        of = value.bytes_B if isinstance(value, SharedBytes) else value
        entry = {"name": name, "dtype": str(of.dtype).removeprefix("torch."), "shape": list(of.shape)}
        if by_reference and of.numel() * of.element_size() >= SHARED_FROM_BYTES:
            memory = value if isinstance(value, SharedBytes) else SharedBytes.copy_of(value)
            lent.append(memory)
            entry["file"] = memory.file
        else:
            pieces += [piece_B.numpy().data for piece_B in flat_bytes(of).split(MAX_FRAME_BYTES) if piece_B.numel()]
        entries.append(entry)
    header = json.dumps({"kind": kind, "fields": fields, "tensors": entries}).encode()
    return [memoryview(header), *pieces], lent


def decode(frames: Sequence[memoryview]) -> Message:
    """Raises ValueError for what is no message."""
    try:
        header, pieces = json.loads(bytes(frames[0])), list(frames[1:])
        kind, fields, entries = header["kind"], header["fields"], header["tensors"]
        if not (isinstance(kind, str) and isinstance(fields, dict) and isinstance(entries, list)):
            raise ValueError("wanted a text, an object and a list")
        tensors = {entry["name"]: _tensor(entry, pieces) for entry in entries}
        if pieces:
            raise ValueError(f"{len(pieces)} frames belong to no tensor")
        return Message(kind, fields, tensors)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"got what is no message: {error!r:.300}") from None


def _tensor(entry: Mapping[str, Any], pieces: list[memoryview]) -> Tensor:
    """Takes its bytes from the front of the pieces, before memory is taken for them."""
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    num_bytes = dtype.itemsize * math.prod(entry["shape"])
    if "file" in entry:
        flat_B = mapped(*entry["file"])[:num_bytes]
    else:
        count = -(-num_bytes // MAX_FRAME_BYTES)
        own, pieces[:] = pieces[:count], pieces[count:]
        if sum(piece.nbytes for piece in own) != num_bytes:
            raise ValueError(f"tensor {entry['name']!r} has not the {num_bytes} bytes of its shape")
        flat_B = torch.empty(num_bytes, dtype=torch.uint8)
        view, start = flat_B.numpy().data, 0
        for piece in own:
            view[start : start + piece.nbytes] = piece
            start += piece.nbytes
    return flat_B.view(dtype).reshape(entry["shape"])
