"""The patchify kernel: uint8 frames to normalised patches. Frames are read once, values stored 16 bytes at a time.

A band is two patches high, of one frame pair: its patches are adjacent in the result. A program makes PAIRS pixel pairs
of a band (a pair: 2 pixels side by side, 6 bytes; 7 or 8 pairs are a row of a patch of 14 or 16 pixels), so that all
divisions per lane are by constants.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..compile_cases import CompileCase
from ..reference import CLIP_MEAN, CLIP_STD

# 8 pairs a lane: 16 loads in flight, 2 stores of 16 bytes per channel, 12.5 instructions a value (4 pairs: 15)
LAUNCH: dict[str, Any] = {"PAIRS": 1024, "num_warps": 4, "num_stages": 1}


def block_pairs(patch_px: int) -> int:
    """Pixel pairs of 2 x 2 patches of two frames."""
    return 4 * 2 * patch_px * patch_px // 2


def scales(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """(mean, std, 1 / std, -mean / std) of each channel in levels of a byte; float32, as the reference holds them."""
    mean_3, std_3 = torch.tensor(mean) * 255.0, torch.tensor(std) * 255.0
    shift_3 = (-mean_3.double() / std_3.double()).float()
    return tuple(torch.stack([mean_3, std_3, 1.0 / std_3, shift_3], dim=1).flatten().tolist())


@triton.jit
def _normalised(byte, mean, std, inv_std, shift, IS_HALF: tl.constexpr):
    """(byte - mean) / std. With the published means and deviations, CLIP's and 0.5, both branches give the bits of a
    true float32 division for each of the 256 bytes."""
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
    rgb_ptr,
    out_ptr,
    frame_stride,
    row_stride,
    num_frames,
    bands_down,
    blocks_across,
    PATCH: tl.constexpr,
    SCALES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Strides are in bytes and multiples of 4, `rgb_ptr` likewise; pixels of a row are adjacent; 2 PATCH row_stride <
    2^31. PATCH: pixels of a side, even. SCALES: see `scales`.

    Grid: frame pairs x `bands_down` x programs of a band. The last frame stands in for a missing one.
    """
    ROW_PAIRS: tl.constexpr = PATCH // 2  # of a patch
    CHANNEL_VALUES: tl.constexpr = 2 * PATCH * PATCH  # of a patch
    BLOCK_POSITIONS: tl.constexpr = 4 * CHANNEL_VALUES  # values of one channel in 2 x 2 patches
    programs_across = tl.cdiv(blocks_across * BLOCK_POSITIONS, 2 * PAIRS)
    band = tl.program_id(0) // programs_across
    start = tl.program_id(0) % programs_across * PAIRS
    frame = band // bands_down * 2
    band_ptr = rgb_ptr + (band % bands_down * (2 * PATCH)).to(tl.int64) * row_stride
    frame_0_ptr = band_ptr + frame.to(tl.int64) * frame_stride
    frame_1_ptr = band_ptr + tl.minimum(frame + 1, num_frames - 1).to(tl.int64) * frame_stride

    pair = start + tl.arange(0, PAIRS)
    patch_row = pair // ROW_PAIRS
    run = patch_row // PATCH  # counts (block across, patch down, patch across, frame)
    pixel_row = patch_row - run * PATCH + (run // 4 % 2) * PATCH
    column = (pair - patch_row * ROW_PAIRS) * 6 + (run // 2 % 2) * (3 * PATCH) + run // 8 * (6 * PATCH)
    # The 6 bytes start at an even byte, so they lie in two aligned words, which do not leave the row: its bytes are a
    # multiple of 4.
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
    value_ptr = out_ptr + band.to(tl.int64) * blocks_across * (3 * BLOCK_POSITIONS)
    value_ptr += position + position // CHANNEL_VALUES * (2 * CHANNEL_VALUES)
    mask = position < blocks_across * BLOCK_POSITIONS
    _store_channel(value_ptr, low & 255, low >> 24, SCALES[0], SCALES[1], SCALES[2], SCALES[3], mask, PAIRS)
    value_ptr += CHANNEL_VALUES
    _store_channel(value_ptr, low >> 8 & 255, high & 255, SCALES[4], SCALES[5], SCALES[6], SCALES[7], mask, PAIRS)
    value_ptr += CHANNEL_VALUES
    _store_channel(
        value_ptr, low >> 16 & 255, high >> 8 & 255, SCALES[8], SCALES[9], SCALES[10], SCALES[11], mask, PAIRS
    )


def compile_cases() -> list[CompileCase]:
    """One for each dtype of the result, for either size of a patch that is published."""
    signature = {
        "rgb_ptr": "*u8", "out_ptr": "", "frame_stride": "i32", "row_stride": "i32", "num_frames": "i32",
        "bands_down": "i32", "blocks_across": "i32", "PATCH": "constexpr", "SCALES": "constexpr", "PAIRS": "constexpr",
    }  # fmt: skip
    clip, half = scales(CLIP_MEAN, CLIP_STD), scales((0.5,) * 3, (0.5,) * 3)
    return [
        CompileCase(
            name=f"patchify {patch_px} px {dtype}",
            kernel=patchify_kernel,
            signature={**signature, "out_ptr": f"*{dtype}"},
            constexprs={"PATCH": patch_px, "SCALES": levels, "PAIRS": LAUNCH["PAIRS"]},
            divisible_by_16=("rgb_ptr", "out_ptr"),
            lengths=("frame_stride", "row_stride", "num_frames", "bands_down", "blocks_across"),
            num_warps=LAUNCH["num_warps"],
            num_stages=LAUNCH["num_stages"],
            expects_wide_loads=False,  # 6 bytes of two pixels: 4-byte words are the widest aligned pieces
        )
        for patch_px, levels in ((14, clip), (16, half))
        for dtype in ("bf16", "fp16", "fp32")
    ]
