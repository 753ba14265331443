"""Frames to what the vision tower takes."""

from __future__ import annotations

import torch
from vcr1_kernels import reference

from vcr1_fast.types import Frames, Patches

PATCH_PX = 14
FRAMES_PER_PATCH = 2


def to_patches(frames: Frames, dtype: torch.dtype = torch.float32) -> Patches:
    """`Frames` [F, H, W, 3] -> `Patches` [F/2 * H/14 * W/14, 1176], on the device of the frames.

    second_per_grid_s = 2 / sampled_fps, because two frames make one temporal step (Qwen2.5-VL).
    """
    num_frames, height_px, width_px, _ = frames.rgb_FHW3.shape
    num_pairs = -(-num_frames // FRAMES_PER_PATCH)
    return Patches(
        values_PC=reference.patchify(frames.rgb_FHW3, dtype),
        grid_thw=(num_pairs, height_px // PATCH_PX, width_px // PATCH_PX),
        second_per_grid_s=FRAMES_PER_PATCH / frames.sampled_fps,
        num_frames=num_frames,
        duration_s=frames.duration_s,
    )
