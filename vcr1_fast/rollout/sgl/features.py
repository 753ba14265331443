"""A video's patches or embeddings on their way through SGLang's processes: by reference, not by value.

SGLang draws a group of n by n + 1 requests, the first of which fills the cache, and pickles the features with each: for
a clip of 3,584 video tokens 9 times 67 MB of float32 for a group of 8. Its own shared memory for them is switched off
by skip_tokenizer_init. Here they lie in anonymous memory, and what is pickled says where.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.messages import SharedBytes, flat_bytes


class SharedFeatures(Tensor):
    """A tensor that unpickles, in a process of the same user and machine, as a view of the same memory.

    Made by `share`; what is computed from it is an ordinary tensor. Its memory can be opened until `close`; a request
    that SGLang has not read by then ends its scheduler.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    memory: SharedBytes

    @staticmethod
    def share(features: Tensor) -> SharedFeatures:
        """A copy in shared memory. Raises OSError when there is none left."""
        memory = SharedBytes(features.numel() * features.element_size())
        memory.bytes_B.copy_(flat_bytes(features))
        shared = memory.bytes_B.view(features.dtype).view(features.shape).as_subclass(SharedFeatures)
        shared.memory = memory
        return shared

    def close(self) -> None:
        """Nobody opens it any more; those who did, keep it."""
        self.memory.close()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        dtype = str(self.dtype).removeprefix("torch.")
        return opened, (os.getpid(), self.memory.descriptor, dtype, tuple(self.shape))


def opened(process: int, descriptor: int, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor that `SharedFeatures` stands for; what is written into it stays in this process. Raises OSError."""
    with open(f"/proc/{process}/fd/{descriptor}", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=getattr(torch, dtype)).view(shape)
