"""Copies from host to device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host it goes through pinned memory: a copy out of pageable memory would first wait
    for all work of the stream, and the GPU would run dry behind it.

    A pinned `x` is read in place, after the call: it must not be overwritten before the device has got there.
    """
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def upload_ints(tables: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each table as int32 on `device`, all of them in one copy.

    They are views of one tensor, each from a multiple of 16 bytes on, which is what kernels are compiled for.
    """
    numbers: list[int] = []
    starts: list[int] = []
    for table in tables:
        starts.append(len(numbers))
        numbers += table
        numbers += [0] * (-len(numbers) % 4)
    sent = upload(torch.tensor(numbers, dtype=torch.int32), device)
    return [sent[start : start + len(table)] for start, table in zip(starts, tables, strict=True)]
