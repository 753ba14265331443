"""At what size the model sees a frame: multiples of a video token's side under a budget for the whole video.

All comparisons are on integers: with f pixels to a side, floor(height / sqrt(height * width / budget) / f) is
isqrt(height * budget / (width * f^2)), which has no rounding error to push an exact multiple one step down.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F  # noqa: N812

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.formats import QWEN2_5_VL

MAX_ASPECT_RATIO = 200


def max_pixels_per_frame(num_frames: int, config: VideoConfig) -> Fraction:
    """Pixels one of `num_frames` frames may have: max(min(max_frame_pixels, 2 * total / n), 1.05 * min_frame_pixels).

    The 2 is there because two frames share one row of tokens: 2 * total is the budget of all frames, which Qwen3-VL's
    processor calls longest_edge.
    """
    share = min(Fraction(config.max_frame_pixels), Fraction(2 * config.total_pixels, num_frames))
    return max(share, Fraction(config.min_frame_pixels * 105 // 100))


def frame_size_px(
    height_px: int, width_px: int, num_frames: int, config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px
) -> tuple[int, int]:
    """(height, width) in pixels of what the model sees: multiples of factor_px, aspect ratio kept as far as possible.

    With the budget of `max_pixels_per_frame`, see `fitting_size_px`. `factor_px`: see `VideoFormat`.
    """
    highest = max_pixels_per_frame(num_frames, config)
    return fitting_size_px(height_px, width_px, config.min_frame_pixels, highest, factor_px)


def fitting_size_px(height_px: int, width_px: int, lowest: int, highest: Fraction, factor_px: int) -> tuple[int, int]:
    """The same with between `lowest` and `highest` pixels: Qwen's `smart_resize`; the first rounding is held at
    factor_px or more, so a strip thinner than half of that is not rounded to nothing.

    Raises ValueError when one side is more than 200 times the other.
    """
    if min(height_px, width_px) < 1 or max(height_px, width_px) > MAX_ASPECT_RATIO * min(height_px, width_px):
        raise ValueError(
            f"frames of {width_px} x {height_px} px (width x height); "
            f"wanted sides that differ by a factor of {MAX_ASPECT_RATIO} at most"
        )
    height = max(factor_px, round(height_px / factor_px) * factor_px)
    width = max(factor_px, round(width_px / factor_px) * factor_px)
    if height * width > highest:
        height = max(1, _floor_sqrt(highest * height_px / width_px / factor_px**2)) * factor_px
        width = max(1, _floor_sqrt(highest * width_px / height_px / factor_px**2)) * factor_px
    elif height * width < lowest:
        height = _ceil_sqrt(Fraction(lowest * height_px, width_px * factor_px**2)) * factor_px
        width = _ceil_sqrt(Fraction(lowest * width_px, height_px * factor_px**2)) * factor_px
    return height, width


def resize_frame(rgb_HW3: torch.Tensor, height_px: int, width_px: int) -> torch.Tensor:
    """[H, W, 3] uint8 -> [height_px, width_px, 3] uint8: bicubic with antialias, clamped to 0..255.

    In fixed point, as the Hugging Face video processor does it and with its bits: 1.7 ms for a frame of 1080p on one
    core, where float32 takes 21. qwen-vl-utils goes through float32: another byte for about a sixth of a photo's
    pixels, by 1 of 255, seldom by more.

    A frame that has the size already is returned as it is.
    """
    if tuple(rgb_HW3.shape[:2]) == (height_px, width_px):
        return rgb_HW3
    rgb_13HW = rgb_HW3.permute(2, 0, 1)[None]
    if rgb_HW3.is_cuda:  # has no fixed point
        values = F.interpolate(rgb_13HW.float(), size=(height_px, width_px), mode="bicubic", antialias=True)
        return values.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
    return F.interpolate(rgb_13HW, size=(height_px, width_px), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _floor_sqrt(value: Fraction) -> int:
    return math.isqrt(math.floor(value))


def _ceil_sqrt(value: Fraction) -> int:
    return math.isqrt(math.ceil(value) - 1) + 1


def largest_clip_bytes(config: VideoConfig) -> int:
    """Upper bound of the pixels of one clip under the budget of `max_pixels_per_frame`, in bytes."""
    highest = max(2 * config.total_pixels, config.max_frames * config.min_frame_pixels * 105 // 100)
    return 3 * min(highest, config.max_frames * config.max_frame_pixels)
