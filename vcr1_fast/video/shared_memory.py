"""Tensors from one process to another without a copy: a worker writes them, the trainer maps them.

The memory is a file that never had a name (memfd), so nothing is left in /dev/shm whoever is killed, a container's
limit on /dev/shm (Docker: 64 MB) does not apply, and the last process that maps it frees it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# Linux allows a process 65,530 mappings. With smaller tensors copied, a cache of 64 GiB stays below that; a copy of
# 1 MiB takes 0.1 ms.
SMALLEST_MAPPED_BYTES = 1 << 20


def write_tensor(tensor: Tensor) -> int:
    """A file descriptor of anonymous memory that holds the bytes of a CPU tensor.

    Raises OSError when there is no memory for it.
    """
    file = os.memfd_create("vcr1-frames", os.MFD_CLOEXEC)
    try:
        unwritten = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        while len(unwritten):
            unwritten = unwritten[os.write(file, unwritten) :]
    except BaseException:
        os.close(file)
        raise
    return file


def map_tensor(file: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that `write_tensor` was given. The descriptor may be closed afterwards.

    From 1 MiB on it is the shared memory itself, freed with the last tensor that views it; below it is a copy.
    """
    size = math.prod(shape)
    num_bytes = size * dtype.itemsize
    assert os.fstat(file).st_size == num_bytes, (os.fstat(file).st_size, shape, dtype)
    # By its name under /proc, as torch closes the descriptor it opens, while Python's mmap keeps one open per clip.
    mapped = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=dtype).view(*shape)
    return mapped if num_bytes >= SMALLEST_MAPPED_BYTES else mapped.clone()
