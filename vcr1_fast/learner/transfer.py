"""Host tensors -> the device, many at once by one copy that nothing waits for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_ALIGN = 16  # bytes: of the widest load, and a multiple of every element


def send(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on `device`: laid out in one buffer in pinned memory, one asynchronous copy, views of it.

    On CUDA the copy runs on a stream of its own, beside the kernels that are already queued; those queued from now on
    wait for it on the GPU, the host does not.
    """
    starts: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        starts[name] = size
        size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, tensor in tensors.items():
        _view(buffer, starts[name], tensor).copy_(tensor)
    moved = _copy(buffer, device)
    return {name: _view(moved, starts[name], tensor) for name, tensor in tensors.items()}


def send_rows(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[sum of rows, ...] of tensors [rows, ...] in their order, as `dtype` on `device`.

    Parts that are there already are only joined; those on the host are joined in pinned memory and sent by one copy in
    the type that they have.
    """
    if all(part.device == device for part in parts):
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return joined.to(dtype)
    first = parts[0]
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    buffer = torch.empty(shape, dtype=first.dtype, pin_memory=device.type == "cuda")
    torch.cat([part.cpu() for part in parts], out=buffer)
    return _copy(buffer, device).to(dtype)


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    end = start + like.numel() * like.element_size()
    return buffer[start:end].view(like.dtype).view(like.shape)


def _copy(buffer: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return buffer.to(device)
    present, beside = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(beside):
        moved = buffer.to(device, non_blocking=True)
    present.wait_stream(beside)
    moved.record_stream(present)  # its memory must not be given away while kernels of this stream read it
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
