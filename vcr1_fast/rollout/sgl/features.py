"""Patches or embeddings of videos and pictures on their way through SGLang's processes: by reference, not by value.

SGLang draws a group of n by n + 1 requests, the first of which fills the cache, and pickles the features with each: for
a clip of 3,584 video tokens 9 times 67 MB of float32 for a group of 8. Its own shared memory for them is switched off
by skip_tokenizer_init. Here they lie in anonymous memory, and what is pickled says where.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.messages import File, SharedBytes, mapped

MAX_MAPPED = 4  # clips kept mapped: of several hundred parts each is pickled apart, and Linux allows 65,530 mappings
kept_mapped = functools.lru_cache(MAX_MAPPED)(mapped)


class SharedFeatures(Tensor):
    """A tensor that unpickles, in a process of the same user and machine, as a view of the same memory.

    Made by `share`; what is computed from it is an ordinary tensor. Its memory can be opened until `close`; a request
    that SGLang has not read by then ends its scheduler.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    memory: SharedBytes
    start: int  # of this tensor's bytes

    @staticmethod
    def share(features: Tensor) -> SharedFeatures:
        """A copy in shared memory. Raises OSError when there is none left."""
        memory = SharedBytes.copy_of(features)
        return SharedFeatures._of(memory.bytes_B.view(features.dtype).view(features.shape), memory, 0)

    @staticmethod
    def _of(values: Tensor, memory: SharedBytes, start: int) -> SharedFeatures:
        shared = values.as_subclass(SharedFeatures)
        shared.memory, shared.start = memory, start
        return shared

    def __getitem__(self, rows: Any) -> Tensor:
        """Rows in one piece are of this kind, too: SGLang parts a video whose tokens stand in several places."""
        values = self.as_subclass(Tensor)[rows]
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            return values
        first = rows.indices(len(self))[0]
        return self._of(values, self.memory, self.start + first * self.stride(0) * self.element_size())

    def close(self) -> None:
        """Nobody opens it any more; those who did, keep it."""
        self.memory.close()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        dtype = str(self.dtype).removeprefix("torch.")
        return opened, (self.memory.file, self.start, dtype, tuple(self.shape))


def opened(file: File, start: int, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor that `SharedFeatures` stands for; what is written into it stays in this process. Raises OSError."""
    data_type: torch.dtype = getattr(torch, dtype)
    num_bytes = data_type.itemsize * math.prod(shape)
    return kept_mapped(*file)[start : start + num_bytes].view(data_type).view(tuple(shape))
