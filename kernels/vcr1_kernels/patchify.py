"""Frames to vision-tower patches in one pass: uint8 in, normalised bfloat16 out, no float32 copy between.

Shape letters: F frames, H W pixels, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix
from .backend import Backend, runs_triton
from .input_checks import check_tensors

PATCH_VALUES = 3 * 2 * reference.PATCH_PX**2  # 1176
BLOCK_PX = 2 * reference.PATCH_PX  # the 2 x 2 patches that the vision tower merges into one token
MAX_ROW_STRIDE = 2**31 // BLOCK_PX  # bytes; offsets inside a band of 28 rows are 32-bit


def patchify(rgb_FHW3: Tensor, dtype: torch.dtype = torch.bfloat16, *, backend: Backend = "auto") -> Tensor:
    """Frames to vision-tower input, in the order and with the values of the Hugging Face Qwen2-VL video processor.

    value = (byte - 255 * mean) / (255 * std), CLIP's mean and std per channel, computed in float32 and rounded once to
    `dtype`. Rows run over frame pairs, blocks of 28 x 28 pixels (down, then across) and the 2 x 2 patches of a block; a
    row holds 3 channels x 2 frames x 14 x 14 values. The last frame is repeated when F is odd.

    Args:
        rgb_FHW3: [F, H, W, 3] uint8, F >= 1, H and W multiples of 28. Any strides; frames and rows that are slices of a
            larger clip are read in place when they start at multiples of 4 bytes, anything else is copied first.
        dtype: bfloat16, float16 or float32.
        backend: `auto` runs the Triton kernel for CUDA tensors and `reference.patchify` for CPU tensors.

    Returns [P, 1176] on the device of the input, P = ceil(F / 2) * H / 14 * W / 14: the bits of `reference.patchify`.

    Bytes: 1 in and 2 out per value (4 out in float32), the floor of the problem; for 128 x 448 x 672 pixels 116 MB in
    and 231 MB out. A row of a patch is 42 bytes, so neighbouring lanes read frames in 4-byte words (2 loads for 6
    values), regroup values through shared memory and store 16 bytes each; kernels/README.md has the compiled facts.

    Raises: ValueError for another input or dtype; TypeError for what is no tensor; RuntimeError when `triton` is asked
    for and cannot run.
    """
    _check(rgb_FHW3, dtype)
    return _patchify(rgb_FHW3, dtype, runs_triton(backend, rgb_FHW3))


def _check(rgb_FHW3: Tensor, dtype: torch.dtype) -> None:
    check_tensors("patchify", frames=rgb_FHW3)
    shape = tuple(rgb_FHW3.shape)
    is_clip = len(shape) == 4 and shape[0] >= 1 and shape[3] == 3
    if rgb_FHW3.dtype != torch.uint8 or not is_clip or shape[1] % BLOCK_PX or shape[2] % BLOCK_PX:
        raise ValueError(
            f"patchify got {rgb_FHW3.dtype} {shape}, wanted torch.uint8 [F >= 1, H, W, 3] with H and W multiples of 28"
        )
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"patchify got dtype {dtype}, wanted bfloat16, float16 or float32; reference.patchify makes float64"
        )


@torch.library.custom_op(add_op_namespace_prefix("patchify"), mutates_args=())
def _patchify(rgb_FHW3: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    return _launch(rgb_FHW3, dtype) if triton else reference.patchify(rgb_FHW3, dtype)


@_patchify.register_fake
def _(rgb_FHW3: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    num_frames, height, width, _ = rgb_FHW3.shape
    num_patches = (num_frames + 1) // 2 * (height // reference.PATCH_PX) * (width // reference.PATCH_PX)
    return rgb_FHW3.new_empty(num_patches, PATCH_VALUES, dtype=dtype)


def _is_readable(rgb_FHW3: Tensor) -> bool:
    """Whether the kernel can read these strides: pixels adjacent, rows and frames at multiples of 4 bytes."""
    frame_stride, row_stride, *pixel_strides = rgb_FHW3.stride()
    is_aligned = (rgb_FHW3.data_ptr() | frame_stride | row_stride) % 4 == 0
    return pixel_strides == [3, 1] and is_aligned and 0 <= row_stride < MAX_ROW_STRIDE


def _launch(rgb_FHW3: Tensor, dtype: torch.dtype) -> Tensor:
    from .device.patchify import BLOCK_PAIRS, LAUNCH, patchify_kernel

    if not _is_readable(rgb_FHW3):
        rgb_FHW3 = rgb_FHW3.clone(memory_format=torch.contiguous_format)
    num_frames, height, width, _ = rgb_FHW3.shape
    bands_down, blocks_across = height // BLOCK_PX, width // BLOCK_PX
    num_pairs = (num_frames + 1) // 2
    out_PC = rgb_FHW3.new_empty(num_pairs * bands_down * blocks_across * 4, PATCH_VALUES, dtype=dtype)
    programs_across = -(-blocks_across * BLOCK_PAIRS // LAUNCH["PAIRS"])
    num_programs = num_pairs * bands_down * programs_across
    if num_programs:
        with torch.cuda.device_of(rgb_FHW3):  # Triton launches on the current device; nothing to do for a CPU tensor
            patchify_kernel[(num_programs,)](
                rgb_FHW3,
                out_PC,
                rgb_FHW3.stride(0),
                rgb_FHW3.stride(1),
                num_frames,
                bands_down,
                blocks_across,
                **LAUNCH,
            )
    return out_PC
