"""Frame sizes by hand; test_processor_oracle.py has those of transformers."""

from fractions import Fraction

import pytest
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.resolution import frame_size_px, max_pixels_per_frame, resize_frame


def test_budget_of_30_seconds() -> None:
    # 60 frames: 2 * 3584 / 60 = 119.4667 blocks of 28 x 28 a frame
    assert max_pixels_per_frame(60, VideoConfig()) == Fraction(2 * 3584 * 784, 60)
    # 1080 x 1920: sqrt(119.4667 * 1080 / 1920) = 8.197 -> 8; sqrt(119.4667 * 1920 / 1080) = 14.57 -> 14
    assert frame_size_px(1080, 1920, 60, VideoConfig()) == (8 * 28, 14 * 28)


def test_few_frames_meet_the_frame_limit_and_many_the_floor() -> None:
    assert max_pixels_per_frame(4, VideoConfig()) == 768 * 784
    # 2 * 3584 / 768 = 9.33 blocks is less than 1.05 * 16 blocks = 13171.2 px
    assert max_pixels_per_frame(768, VideoConfig()) == 13171


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [
        (112, 112, (112, 112)),  # fits: 16 blocks is the least
        (64, 96, (112, 140)),  # 6 blocks: sqrt(16 * 64 / 96) = 3.27 -> 4, sqrt(16 * 96 / 64) = 4.9 -> 5
        (126, 154, (112, 168)),  # 4.5 -> 4 and 5.5 -> 6: ties go to even
        (10, 2000, (28, 1988)),  # 0.36 -> 1 (held at 28 px), 71.43 -> 71
    ],
)
def test_small_frames(height: int, width: int, wanted: tuple[int, int]) -> None:
    assert frame_size_px(height, width, 8, VideoConfig()) == wanted


def test_exact_squares_are_not_rounded_down() -> None:
    # The budget is 9 x 16 blocks and the frame has that shape: 9 / 16 scaled by sqrt comes out whole
    config = VideoConfig(max_frame_pixels=144 * 784)
    for scale in range(2, 30):
        assert frame_size_px(9 * 28 * scale, 16 * 28 * scale, 2, config) == (9 * 28, 16 * 28)


def test_extreme_shapes_are_refused() -> None:
    assert frame_size_px(10, 2000, 2, VideoConfig()) == (28, 1988)
    with pytest.raises(ValueError, match="2001 x 10 px"):
        frame_size_px(10, 2001, 2, VideoConfig())


def test_resize_keeps_constants_and_clamps_overshoot() -> None:
    grey = torch.full((50, 70, 3), 77, dtype=torch.uint8)
    assert (resize_frame(grey, 28, 56) == 77).all()
    edge = torch.zeros(28, 56, 3, dtype=torch.uint8)
    edge[:, 28:] = 255  # bicubic overshoots at an edge: below 0 and above 255 without the clamp
    wide = resize_frame(edge, 28, 112)
    assert wide.dtype == torch.uint8 and wide.shape == (28, 112, 3)
    assert wide[0, :40].max() == 0 and wide[0, -40:].min() == 255


def test_resize_to_the_same_size_copies_nothing() -> None:
    frame = torch.zeros(28, 28, 3, dtype=torch.uint8)
    assert resize_frame(frame, 28, 28) is frame


@pytest.mark.gpu
@pytest.mark.parametrize("size_px", [(84, 112), (448, 616)])
def test_a_frame_is_resized_on_a_gpu_as_on_the_cpu(size_px: tuple[int, int]):
    """In float32, where the CPU rounds twice in fixed point."""
    rgb_HW3 = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, want = resize_frame(rgb_HW3.cuda(), *size_px).cpu(), resize_frame(rgb_HW3, *size_px)
    assert got.dtype == torch.uint8 and (got.float() - want.float()).abs().mean() < 1
