"""Patch rows against loops that follow the definition; test_processor_oracle.py has those of transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from vcr1_kernels.reference import CLIP_MEAN, CLIP_STD, patchify

from vcr1_fast.types import Frames
from vcr1_fast.video.patches import to_frames, to_patches


def random_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def patchify_by_loops(rgb_FHW3: np.ndarray) -> np.ndarray:
    """Row by row, value by value, in float64. An odd last frame pairs with itself."""
    num_frames, height, width, _ = rgb_FHW3.shape
    rows = []
    for pair in range(0, num_frames, 2):
        two = [rgb_FHW3[pair], rgb_FHW3[min(pair + 1, num_frames - 1)]]
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    row = [
                        (frame[top + y + i, left + x + j, channel] / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
                        for channel in range(3)
                        for frame in two
                        for i in range(14)
                        for j in range(14)
                    ]
                    rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_rows_and_columns_follow_the_definition(num_frames: int) -> None:
    frames = random_frames(num_frames, 56, 84)
    expected = patchify_by_loops(frames.numpy())
    assert expected.shape == ((num_frames + 1) // 2 * 4 * 6, 1176)
    got = patchify(frames, torch.float64)
    # The constants are held times 255: a few roundings of 1e-16 of values up to 3
    assert np.abs(got.numpy() - expected).max() < 1e-14
    assert np.abs(patchify(frames).numpy() - expected).max() < 1e-6  # 4 float32 roundings of values up to 3


def test_half_precision_is_rounded_once() -> None:
    frames = random_frames(2, 28, 28)
    assert torch.equal(patchify(frames, torch.bfloat16), patchify(frames).bfloat16())


def test_patches_know_their_grid_and_rate() -> None:
    frames = Frames(random_frames(6, 56, 84), torch.arange(6) / 4.0, sampled_fps=4.0, duration_s=1.5, reader="none")
    patches = to_patches(frames)
    assert patches.grid_thw == (3, 4, 6)
    assert patches.values_PC.shape == (72, 1176)
    assert patches.second_per_grid_s == 0.5
    assert patches.num_tokens == 18
    assert (patches.num_frames, patches.duration_s) == (6, 1.5)
    assert patches.pair_times_s == (0.125, 0.625, 1.125)
    assert to_patches(replace(frames, rgb_FHW3=frames.rgb_FHW3[:3], times_s=frames.times_s[:3])).pair_times_s == (
        0.125,
        0.5,
    )


def fill_with_noise(rgb_FHW3: torch.Tensor) -> torch.Tensor:
    return rgb_FHW3.copy_(random_frames(*rgb_FHW3.shape[:3]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["page-locked", "of another stream"])
def test_frames_may_be_let_go_while_the_gpu_is_busy(kind: str) -> None:
    """Copy and kernel wait behind a second of other work; the memory of the frames is asked for anew at once."""
    shape, reading = (4, 280, 280, 3), torch.cuda.Stream()

    def empty() -> torch.Tensor:
        if kind == "page-locked":
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(reading):
            return torch.empty(shape, dtype=torch.uint8, device="cuda")

    with torch.cuda.stream(reading):
        frames = Frames(fill_with_noise(empty()), torch.arange(4) / 2.0, 2.0, 2.0, reader="none")
    reading.synchronize()
    expected = patchify(frames.rgb_FHW3.cpu())
    torch.cuda._sleep(2_000_000_000)
    patches = to_patches(frames, device=torch.device("cuda"))
    del frames
    with torch.cuda.stream(reading):
        later = [empty().fill_(k) for k in range(3)]
    reading.synchronize()
    assert torch.equal(patches.values_PC.cpu(), expected) and len(later) == 3


def test_frames_come_back_out_of_patches() -> None:
    rgb_FHW3 = random_frames(6, 56, 84)
    patches = to_patches(Frames(rgb_FHW3, torch.arange(6.0, dtype=torch.float64), 1.0, 6.0, "made"))
    again_FHW3 = to_frames(patches, [0, 2])
    assert again_FHW3 is not None and torch.equal(again_FHW3, rgb_FHW3[[0, 4]])  # the first of each pair
    assert to_frames(replace(patches, embeddings_MD=torch.zeros(1, 1)), [0]) is None
