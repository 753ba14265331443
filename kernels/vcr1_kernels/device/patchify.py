"""The patchify kernel: uint8 frames to normalised patches. Frames are read once, values stored 16 bytes at a time.

A band is 28 pixel rows of one frame pair: its patches are adjacent in the result. A program makes PAIRS pixel pairs of
a band (a pair: 2 pixels side by side, 6 bytes; 7 pairs are a row of a patch), so that all divisions per lane are by 7,
14 and 392.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..compile_cases import CompileCase
from ..reference import CLIP_MEAN, CLIP_STD

# 8 pairs a lane: 16 loads in flight, 2 stores of 16 bytes per channel, 12.5 instructions a value (4 pairs: 15)
LAUNCH: dict[str, Any] = {"PAIRS": 1024, "num_warps": 4, "num_stages": 1}
BLOCK_PAIRS = 4 * 2 * 14 * 7  # of 28 x 28 pixels of two frames: 2 x 2 patches

BLOCK_VALUES = tl.constexpr(4 * 1176)
BLOCK_POSITIONS = tl.constexpr(2 * BLOCK_PAIRS)  # values of one channel
CHANNEL_VALUES = tl.constexpr(2 * 14 * 14)  # of one patch

# In float32, as the reference holds them
_MEAN_3, _STD_3 = torch.tensor(CLIP_MEAN) * 255.0, torch.tensor(CLIP_STD) * 255.0
MEAN_R, MEAN_G, MEAN_B = (tl.constexpr(x) for x in _MEAN_3.tolist())
STD_R, STD_G, STD_B = (tl.constexpr(x) for x in _STD_3.tolist())
INV_R, INV_G, INV_B = (tl.constexpr(x) for x in (1.0 / _STD_3).tolist())
SHIFT_R, SHIFT_G, SHIFT_B = (tl.constexpr(x) for x in (-_MEAN_3.double() / _STD_3.double()).float().tolist())


@triton.jit
def _normalised(byte, mean, std, inv_std, shift, IS_HALF: tl.constexpr):
    """(byte - mean) / std. For each of the 3 x 256 inputs both branches give the bits of a true float32 division."""
    x = byte.to(tl.float32)
    if IS_HALF:
        return tl.fma(x, inv_std, shift)  # equal after rounding to bfloat16 or float16
    distance = x - mean
    quotient = distance * inv_std
    return tl.fma(tl.fma(-quotient, std, distance), inv_std, quotient)  # one Newton step: the remainder is exact


@triton.jit
def _store_channel(out_ptr, even, odd, mean, std, inv_std, shift, mask, PAIRS: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    even = _normalised(even, mean, std, inv_std, shift, dtype != tl.float32)
    odd = _normalised(odd, mean, std, inv_std, shift, dtype != tl.float32)
    tl.store(out_ptr, tl.reshape(tl.join(even, odd), (2 * PAIRS,)).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["frame_stride", "row_stride", "num_frames", "bands_down", "blocks_across"])
def patchify_kernel(
    rgb_ptr, out_ptr, frame_stride, row_stride, num_frames, bands_down, blocks_across, PAIRS: tl.constexpr
):
    """Strides are in bytes and multiples of 4, `rgb_ptr` likewise; pixels of a row are adjacent; 28 row_stride < 2^31.

    Grid: frame pairs x `bands_down` x programs of a band. The last frame stands in for a missing one.
    """
    programs_across = tl.cdiv(blocks_across * BLOCK_POSITIONS, 2 * PAIRS)
    band = tl.program_id(0) // programs_across
    start = tl.program_id(0) % programs_across * PAIRS
    frame = band // bands_down * 2
    band_ptr = rgb_ptr + (band % bands_down * 28).to(tl.int64) * row_stride
    frame_0_ptr = band_ptr + frame.to(tl.int64) * frame_stride
    frame_1_ptr = band_ptr + tl.minimum(frame + 1, num_frames - 1).to(tl.int64) * frame_stride

    pair = start + tl.arange(0, PAIRS)
    patch_row = pair // 7
    run = patch_row // 14  # counts (block across, patch down, patch across, frame)
    pixel_row = patch_row - run * 14 + (run // 4 % 2) * 14
    column = (pair - patch_row * 7) * 6 + (run // 2 % 2) * 42 + run // 8 * 84
    # The 6 bytes start at an even byte, so they lie in two aligned words, which do not leave the row of 84 k bytes.
    misalignment = column % 4
    frame_ptr = tl.where(run % 2 == 0, frame_0_ptr, frame_1_ptr)
    word_ptr = (frame_ptr + (pixel_row * row_stride + (column - misalignment))).to(tl.pointer_type(tl.uint32))
    is_pair = pair < blocks_across * (BLOCK_POSITIONS // 2)
    word_0 = tl.load(word_ptr, mask=is_pair, other=0)
    word_1 = tl.load(word_ptr + 1, mask=is_pair, other=0)
    low = tl.where(misalignment == 0, word_0, (word_0 >> 16) | (word_1 << 16))  # bytes r g b r
    high = tl.where(misalignment == 0, word_1, word_1 >> 16)  # bytes g b

    # Addresses from the index of the value itself: Triton then sees runs of 8 values that start at 16-byte addresses.
    position = 2 * start + tl.arange(0, 2 * PAIRS)
    value_ptr = out_ptr + band.to(tl.int64) * blocks_across * BLOCK_VALUES
    value_ptr += position + position // CHANNEL_VALUES * (2 * CHANNEL_VALUES)
    mask = position < blocks_across * BLOCK_POSITIONS
    _store_channel(value_ptr, low & 255, low >> 24, MEAN_R, STD_R, INV_R, SHIFT_R, mask, PAIRS)
    value_ptr += CHANNEL_VALUES
    _store_channel(value_ptr, low >> 8 & 255, high & 255, MEAN_G, STD_G, INV_G, SHIFT_G, mask, PAIRS)
    value_ptr += CHANNEL_VALUES
    _store_channel(value_ptr, low >> 16 & 255, high >> 8 & 255, MEAN_B, STD_B, INV_B, SHIFT_B, mask, PAIRS)


def compile_cases() -> list[CompileCase]:
    """One for each dtype of the result."""
    signature = {
        "rgb_ptr": "*u8", "out_ptr": "", "frame_stride": "i32", "row_stride": "i32", "num_frames": "i32",
        "bands_down": "i32", "blocks_across": "i32", "PAIRS": "constexpr",
    }  # fmt: skip
    return [
        CompileCase(
            name=f"patchify {dtype}",
            kernel=patchify_kernel,
            signature={**signature, "out_ptr": f"*{dtype}"},
            constexprs={"PAIRS": LAUNCH["PAIRS"]},
            divisible_by_16=("rgb_ptr", "out_ptr"),
            lengths=("frame_stride", "row_stride", "num_frames", "bands_down", "blocks_across"),
            num_warps=LAUNCH["num_warps"],
            num_stages=LAUNCH["num_stages"],
            expects_wide_loads=False,  # a row of a patch is 42 bytes: 4-byte words are the widest aligned pieces
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
