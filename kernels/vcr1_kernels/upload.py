"""Copies from host to device that the host does not wait for."""

from __future__ import annotations

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
