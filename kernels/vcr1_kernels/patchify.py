"""Frames to vision-tower patches in one pass: uint8 in, normalised bfloat16 out, no float32 copy between.

Shape letters: F frames, H W pixels, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix
from .backend import Backend, runs_triton
from .input_checks import check_frames, check_tensors


def patchify(
    rgb_FHW3: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    patch_px: int = reference.PATCH_PX,
    mean: Sequence[float] = reference.CLIP_MEAN,
    std: Sequence[float] = reference.CLIP_STD,
    backend: Backend = "auto",
) -> Tensor:
    """Frames to vision-tower input, in the order and with the values of the Hugging Face processors of Qwen-VL models.

    value = (byte - 255 * mean) / (255 * std) per channel, computed in float32 and rounded once to `dtype`. Rows run
    over frame pairs, blocks of 2 x 2 patches (down, then across) and the patches of a block; a row holds C = 3 channels
    x 2 frames x patch_px x patch_px values. The last frame is repeated when F is odd.

    Args:
        rgb_FHW3: [F, H, W, 3] uint8, F >= 1, H and W multiples of two patches. Any strides; frames and rows that are
            slices of a larger clip are read in place when they start at multiples of 4 bytes, anything else is copied
            first.
        dtype: bfloat16, float16 or float32.
        patch_px: side of a patch, even: 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL.
        mean, std: of each channel in [0, 1]; default CLIP's, as in Qwen2.5-VL. Qwen3-VL has 0.5.
        backend: `auto` runs the Triton kernel for CUDA tensors and `reference.patchify` for CPU tensors.

    Returns [P, C] on the device of the input, P = ceil(F / 2) * H * W / patch_px^2: the bits of `reference.patchify`
    for those two means and deviations; a rounding apart at most for others.

    Bytes: 1 in and 2 out per value (4 out in float32), the floor of the problem; for 128 x 448 x 672 pixels 116 MB in
    and 231 MB out. A row of a patch is 42 or 48 bytes, so neighbouring lanes read frames in 4-byte words (2 loads for 6
    values), regroup values through shared memory and store 16 bytes each; kernels/README.md has the compiled facts.

    Raises: ValueError for another input or dtype; TypeError for what is no tensor; RuntimeError when `triton` is asked
    for and cannot run.
    """
    _check(rgb_FHW3, dtype, patch_px, mean, std)
    return _patchify(rgb_FHW3, dtype, patch_px, list(mean), list(std), runs_triton(backend, rgb_FHW3))


def _check(rgb_FHW3: Tensor, dtype: torch.dtype, patch_px: int, mean: Sequence[float], std: Sequence[float]) -> None:
    check_tensors("patchify", frames=rgb_FHW3)
    if patch_px < 2 or patch_px % 2:
        raise ValueError(f"patchify got patch_px {patch_px}, wanted an even number of pixels such as 14 or 16")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"patchify got mean {mean} and std {std}, wanted three numbers each, those of std above 0")
    check_frames(rgb_FHW3, patch_px)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"patchify got dtype {dtype}, wanted bfloat16, float16 or float32; reference.patchify makes float64"
        )


@torch.library.custom_op(add_op_namespace_prefix("patchify"), mutates_args=())
def _patchify(
    rgb_FHW3: Tensor, dtype: torch.dtype, patch_px: int, mean: list[float], std: list[float], triton: bool
) -> Tensor:
    if triton:
        return _launch(rgb_FHW3, dtype, patch_px, mean, std)
    return reference.patchify(rgb_FHW3, dtype, patch_px=patch_px, mean=mean, std=std)


@_patchify.register_fake
def _(rgb_FHW3: Tensor, dtype: torch.dtype, patch_px: int, mean: list[float], std: list[float], triton: bool) -> Tensor:
    num_frames, height, width, _ = rgb_FHW3.shape
    num_patches = (num_frames + 1) // 2 * (height // patch_px) * (width // patch_px)
    return rgb_FHW3.new_empty(num_patches, patch_values(patch_px), dtype=dtype)


def patch_values(patch_px: int) -> int:
    """C: 3 channels x 2 frames x rows x columns."""
    return 3 * 2 * patch_px**2


def _is_readable(rgb_FHW3: Tensor, patch_px: int) -> bool:
    """Whether the kernel can read these strides: pixels adjacent, rows and frames at multiples of 4 bytes, offsets
    inside a band of two patches in 32 bits."""
    frame_stride, row_stride, *pixel_strides = rgb_FHW3.stride()
    is_aligned = (rgb_FHW3.data_ptr() | frame_stride | row_stride) % 4 == 0
    return pixel_strides == [3, 1] and is_aligned and 0 <= row_stride < 2**31 // (2 * patch_px)


def _launch(rgb_FHW3: Tensor, dtype: torch.dtype, patch_px: int, mean: list[float], std: list[float]) -> Tensor:
    from .device.patchify import LAUNCH, block_pairs, patchify_kernel, scales

    if not _is_readable(rgb_FHW3, patch_px):
        rgb_FHW3 = rgb_FHW3.clone(memory_format=torch.contiguous_format)
    num_frames, height, width, _ = rgb_FHW3.shape
    bands_down, blocks_across = height // (2 * patch_px), width // (2 * patch_px)
    num_pairs = (num_frames + 1) // 2
    out_PC = rgb_FHW3.new_empty(num_pairs * bands_down * blocks_across * 4, patch_values(patch_px), dtype=dtype)
    programs_across = -(-blocks_across * block_pairs(patch_px) // LAUNCH["PAIRS"])
    num_programs = num_pairs * bands_down * programs_across
    constants: dict[str, Any] = {"PATCH": patch_px, "SCALES": scales(mean, std), **LAUNCH}
    if num_programs:
        with torch.cuda.device_of(rgb_FHW3):  # Triton launches on the current device; nothing to do for a CPU tensor
            patchify_kernel[(num_programs,)](
                rgb_FHW3, out_PC, rgb_FHW3.stride(0), rgb_FHW3.stride(1), num_frames, bands_down, blocks_across,
                **constants,
            )  # fmt: skip
    return out_PC
