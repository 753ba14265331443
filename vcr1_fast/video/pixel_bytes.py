"""Pixels as the bytes they were: patches hold one of 256 values per channel, and are sent as its number.

    values_PC [P, C]  ->  bytes_PC [P, C] uint8 and levels_C256 [3, 256], the value of each byte in each channel

A quarter of float32, half of bfloat16: a video of 3,584 tokens has 17 MB instead of 67 or 34 (as many bytes as its
frames). `pack` gives bytes only where `unpack` makes the same values of them, bit for bit; other values (patches that
did not come from frames) are sent as they are. The levels travel with each request, so that the worker needs to know
nothing of means and deviations.

`pack` runs in the trainer, on the device of the patches; `unpack` in the worker's interpreter (standard library, numpy
and torch). A row's C values are 3 channels, each 2 frames x the pixels of a patch: 3 x 392, of Qwen3-VL 3 x 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.video.formats import FORMATS, VideoFormat

NUM_CHANNELS, NUM_LEVELS = 3, 256
_SAME_SIZE = {2: torch.int16, 4: torch.int32}


def byte_levels(video: VideoFormat) -> Tensor:
    """[3, 256] float32, ascending: what `vcr1_kernels.patchify` makes of each byte before it rounds to its dtype.

    Its formula, (byte - 255 * mean) / (255 * std) in float32; where it gave other values, nothing would be packed.
    """
    mean_3, std_3 = torch.tensor(video.mean) * 255.0, torch.tensor(video.std) * 255.0
    return (torch.arange(256.0) - mean_3[:, None]) / std_3[:, None]


def pack(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a request with `values_PC` as bytes, where that is exact; all of them as they were where not."""
    values_PC = tensors.get("values_PC")
    if values_PC is None or values_PC.numel() == 0 or values_PC.dtype.itemsize not in _SAME_SIZE:
        return dict(tensors)
    video = next((video for video in FORMATS.values() if video.patch_values == values_PC.shape[1]), None)
    if video is None:
        return dict(tensors)
    levels = byte_levels(video).to(values_PC.device, values_PC.dtype)
    by_channel = values_PC.view(len(values_PC), NUM_CHANNELS, -1)
    bytes_P = torch.empty(by_channel.shape, dtype=torch.uint8, device=values_PC.device)
    for channel in range(NUM_CHANNELS):
        values = by_channel[:, channel].contiguous()
        # In bfloat16 neighbours share a value: the first of them stands for both, as the value is all that counts.
        index = torch.searchsorted(levels[channel], values, out_int32=True).clamp_(max=NUM_LEVELS - 1)
        if not torch.equal(levels[channel][index], values):
            return dict(tensors)
        bytes_P[:, channel] = index
    packed = {name: value for name, value in tensors.items() if name != "values_PC"}
    return packed | {"bytes_PC": bytes_P.view(values_PC.shape), "levels_C256": levels}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given."""
    unpacked = dict(tensors)
    bytes_PC, levels = unpacked.pop("bytes_PC", None), unpacked.pop("levels_C256", None)
    if bytes_PC is None or levels is None:
        return unpacked
    values_PC = torch.empty(bytes_PC.shape, dtype=levels.dtype)
    # numpy looks up by bytes: torch would want 8 bytes of index for each. Both see the same bits, as integers.
    integer = _SAME_SIZE[levels.dtype.itemsize]
    out = values_PC.view(integer).view(len(bytes_PC), NUM_CHANNELS, -1).numpy()
    table, rows = levels.view(integer).numpy(), bytes_PC.view(len(bytes_PC), NUM_CHANNELS, -1).numpy()
    for channel in range(NUM_CHANNELS):
        out[:, channel] = table[channel][rows[:, channel]]
    return {**unpacked, "values_PC": values_PC}
