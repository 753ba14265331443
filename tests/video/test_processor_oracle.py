"""Frame counts, sizes, patches and ids against transformers' own processors of Qwen2-VL and Qwen3-VL, which run in
another process.

It needs torchvision in a folder of its own (see oracle.txt), named by VCR1_TORCHVISION, else `oracle` in the
environment of this interpreter. Where ours departs from it because the original recipe (qwen-vl-utils) does, a test
says so: which frames are taken. Strips thinner than 15 px are left out: qwen-vl-utils holds the first rounding at 28
px, the processor rounds to 0 and then scales up. Where ours departs because the processor's floats are off by one
rounding (sizes that fit exactly, one frame too many), a test counts how often.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.video.processor_oracle import Answers, Questions
from vcr1_fast.learner.model import load_tokenizer
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Example, Frames, IntervalTruth
from vcr1_fast.video.formats import QWEN2_5_VL, QWEN3_VL, VideoFormat
from vcr1_fast.video.patches import to_patches
from vcr1_fast.video.resolution import fitting_size_px, frame_size_px, resize_frame
from vcr1_fast.video.sampling import choose_frames, even_indices

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("VCR1_TORCHVISION", Path(sys.prefix) / "oracle"))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "torchvision").is_dir(),
    reason=f"no torchvision in {FOLDER}: pip install --no-deps --target {FOLDER} -r tests/video/oracle.txt",
)

BLOCK, BLOCK_3 = 28 * 28, 32 * 32
# The processor takes nine tenths of so many tokens as the pixel budget of a video: 3600 and 115200 blocks.
BUDGETS = {4000: VideoConfig(total_pixels=3600 * BLOCK), 128000: VideoConfig(total_pixels=115200 * BLOCK)}
NARROW = BUDGETS[4000]
# Qwen3-VL's own rule has one budget, of all frames: two frames share a token, so it is twice total_pixels. Its lower
# bound, of all frames too, is ours times their number. With a cap it is the rule of Qwen2.5-VL, as in qwen-vl-utils.
QWEN3 = VideoConfig(total_pixels=12288 * BLOCK_3, min_frame_pixels=4 * BLOCK_3, max_frame_pixels=12288 * 2 * BLOCK_3)
QWEN3_CAPPED = VideoConfig(total_pixels=6000 * BLOCK_3, min_frame_pixels=BLOCK_3, max_frame_pixels=768 * BLOCK_3)
RATES = (24.0, 25.0, 30.0, 60.0, 12.5, 24000 / 1001, 30000 / 1001)
LENGTHS = (*range(2, 62), 115, 239, 240, 241, 299, 300, 301, 719, 1000, 1800, 5400, 24001, 100_000)


def settings_of(max_video_tokens: int) -> dict[str, int]:
    config = BUDGETS[max_video_tokens]
    edges = {"shortest_edge": config.min_frame_pixels, "longest_edge": config.max_frame_pixels}
    return {**edges, "max_video_tokens": max_video_tokens}


def settings_of_qwen3(config: VideoConfig, num_frames: int) -> dict[str, int]:
    is_capped = config is QWEN3_CAPPED
    lowest = config.min_frame_pixels * (1 if is_capped else num_frames)
    edges = {"shortest_edge": lowest, "longest_edge": 2 * config.total_pixels, "patch_size": 16}
    return edges | ({"max_video_tokens": 768} if is_capped else {})


def random_sizes(count: int, least_px: int = 15) -> list[tuple[int, int, int, int]]:
    """(height, width, number of frames, tokens), no side below least_px."""
    rng, found = random.Random(0), []
    for _ in range(count):
        height = round(math.exp(rng.uniform(math.log(least_px), math.log(4500))))
        width = round(min(max(least_px, height * math.exp(rng.uniform(-2.5, 2.5))), 8000))
        found.append((height, width, 2 * rng.randint(1, 384), rng.choice(sorted(BUDGETS))))
    return found


def photo_like(num_frames: int, height: int, width: int) -> torch.Tensor:
    """[F, H, W, 3] uint8: waves of many lengths, hard edges, and the noise of a camera."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    rgb = np.zeros((num_frames, height, width, 3))
    for _ in range(24):
        waves_y, waves_x = rng.normal(0, 0.08, 2)
        tint, start, speed = rng.uniform(-1, 1, 3), rng.uniform(0, 6.28), rng.normal(0, 0.3)
        for k in range(num_frames):
            rgb[k] += np.sin(waves_y * y + waves_x * x + start + speed * k)[..., None] * tint
    rgb = 128 + 40 * rgb + rng.normal(0, 4, rgb.shape)
    rgb[:, height // 3 : height // 2, width // 4 : width // 2] = (250, 240, 20)
    return torch.from_numpy(rgb.clip(0, 255).astype(np.uint8))


def noise(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def image_settings(patch_px: int) -> dict[str, int]:
    return {"shortest_edge": 4 * 4 * patch_px**2, "longest_edge": 100 * 4 * patch_px**2, "patch_size": patch_px}


def size_of(rgb_FHW3: torch.Tensor, factor_px: int = 28) -> tuple[int, int]:
    num_frames, height, width, _ = rgb_FHW3.shape
    return frame_size_px(height, width, num_frames, NARROW if factor_px == 28 else QWEN3, factor_px)


def as_frames(rgb_FHW3: torch.Tensor) -> Frames:
    num_frames = len(rgb_FHW3)
    return Frames(rgb_FHW3, torch.arange(num_frames) / 2.0, 2.0, num_frames / 2, reader="none")


def resized(rgb_FHW3: torch.Tensor, factor_px: int = 28) -> torch.Tensor:
    return torch.stack([resize_frame(rgb_HW3, *size_of(rgb_FHW3, factor_px)) for rgb_HW3 in rgb_FHW3])


RANDOM_SIZES = random_sizes(3000)
# Qwen3-VL's processor scales frames below 32 px up to that first; ours and qwen-vl-utils hold the rounding there
RANDOM_SIZES_3 = random_sizes(1500, least_px=32)
SAMPLES = [(n, rate, fps) for n in LENGTHS for rate in RATES for fps in (0.3, 1.0, 2.0, 4.0)]
# Up, down, up and down, odd count of frames, and frames that have their size already
QUESTION, RATE, INDICES = "when does it roll?", 29.97, (0, 15, 97, 210)  # frames of a file, unevenly taken
TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"<|vision_start|><|video_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
RAW_SHAPES = [(4, 90, 120), (4, 360, 480), (3, 200, 101), (2, 480, 854), (4, 112, 140)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """One start of the other process answers all; it takes 5 s."""
    folder = tmp_path_factory.mktemp("oracle")
    photos = [photo_like(*shape) for shape in RAW_SHAPES]
    noises = [noise(*shape) for shape in RAW_SHAPES]
    questions: Questions = {
        "sizes": [(h, w, n, settings_of(tokens)) for h, w, n, tokens in RANDOM_SIZES]
        + [(h, w, n, settings_of_qwen3(c, n)) for c in (QWEN3, QWEN3_CAPPED) for h, w, n, _ in RANDOM_SIZES_3],
        "samples": SAMPLES,
        "clips": [(clip, settings_of(4000)) for clip in (*photos, *noises)]
        + [(clip, settings_of_qwen3(QWEN3, len(clip))) for clip in (*photos, *noises)],
        "images": [(clip[0], image_settings(px)) for px in (14, 16) for clip in (*photos, *noises)],
        "prompts": [(TEXT, resized(noises[0], 32), RATE, list(INDICES))],
    }
    torch.save(questions, folder / "questions.pt")
    path = os.pathsep.join([str(FOLDER), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.video.processor_oracle", "questions.pt", "answers.pt"]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "answers.pt")


def test_sizes_are_those_of_the_processor(answers: Answers) -> None:
    """But for exact fits: 43 x 172 px scaled to 16 blocks is 2 x 8 blocks. The processor's floats make that 3 x 9."""
    num_differing = 0
    for (height, width, num_frames, tokens), theirs in zip(RANDOM_SIZES, answers["sizes"], strict=False):
        ours = frame_size_px(height, width, num_frames, BUDGETS[tokens])
        if ours != theirs:
            num_differing += 1
            assert ours[0] * ours[1] == NARROW.min_frame_pixels and ours[0] * width == ours[1] * height
            assert theirs == (ours[0] + 28, ours[1] + 28)
    assert num_differing <= 6


def test_numbers_of_frames_and_rates_are_those_of_the_processor(answers: Answers) -> None:
    """Which frames is another matter: the processor takes floor(i N / n), the original round(i (N - 1) / (n - 1))."""
    num_longer = 0
    for (num_native, rate, fps), (theirs, their_fps) in zip(SAMPLES, answers["samples"], strict=True):
        ours = choose_frames(np.arange(num_native) / rate, num_native / rate, VideoConfig(fps=fps))
        num_frames = len(ours.indices)
        if len(theirs) != num_frames:  # its arange of floats runs one step too far: 15 frames of 115, which is odd
            num_longer += 1
            assert len(theirs) == num_frames + 1
            continue
        assert ours.sampled_fps == pytest.approx(their_fps, rel=1e-12)
        assert theirs == [i * num_native // num_frames for i in range(num_frames)]
        assert ours.indices == even_indices(num_native, num_frames)
        if num_frames == num_native:
            assert list(ours.indices) == theirs
    assert num_longer <= 20 < len(SAMPLES) / 100


@pytest.mark.parametrize("video_format", [QWEN2_5_VL, QWEN3_VL], ids=["qwen2_5_vl", "qwen3_vl"])
def test_raw_frames_give_the_same_bits(answers: Answers, video_format: VideoFormat) -> None:
    raw = [make(*shape) for make in (photo_like, noise) for shape in RAW_SHAPES]
    theirs = answers["clips"][len(raw) * (video_format is QWEN3_VL) :]
    for rgb_FHW3, (values_PC, grid_thw) in zip(raw, theirs, strict=False):
        patches = to_patches(as_frames(resized(rgb_FHW3, video_format.factor_px)), video_format=video_format)
        assert list(patches.grid_thw) == grid_thw and values_PC.shape[1] == video_format.patch_values
        assert torch.equal(patches.values_PC, values_PC)


def test_qwen3_vl_sizes_are_those_of_its_processor(answers: Answers) -> None:
    """But where its floats are off by one rounding, or its whole pixels a frame cut a fraction off."""
    theirs = iter(answers["sizes"][len(RANDOM_SIZES) :])
    for config in (QWEN3, QWEN3_CAPPED):
        num_differing = 0
        for height, width, num_frames, _ in RANDOM_SIZES_3:
            ours = frame_size_px(height, width, num_frames, config, 32)
            num_differing += ours != next(theirs)
        assert num_differing <= 3


@pytest.mark.parametrize("video_format", [QWEN2_5_VL, QWEN3_VL], ids=["qwen2_5_vl", "qwen3_vl"])
def test_images_have_the_same_bits(answers: Answers, video_format: VideoFormat) -> None:
    """An image is a clip of one frame, which stands for both of its only pair."""
    raw = [make(*shape)[0] for make in (photo_like, noise) for shape in RAW_SHAPES]
    theirs = answers["images"][len(raw) * (video_format is QWEN3_VL) :]
    bounds = image_settings(video_format.patch_px)
    for rgb_HW3, (values_PC, grid_thw) in zip(raw, theirs, strict=False):
        limits = bounds["shortest_edge"], Fraction(bounds["longest_edge"])
        size_px = fitting_size_px(*rgb_HW3.shape[:2], *limits, video_format.factor_px)
        frames = replace(as_frames(rgb_HW3[None]), rgb_FHW3=resize_frame(rgb_HW3, *size_px)[None])
        patches = to_patches(frames, video_format=video_format)
        assert list(patches.grid_thw) == grid_thw
        assert torch.equal(patches.values_PC, values_PC)


def test_qwen3_vl_prompts_have_the_ids_of_its_processor(answers: Answers) -> None:
    """transformers 5 puts times and blocks between the two tokens of the template, where 4.57, with which the
    checkpoints were published, puts them in their place: two tokens more, the first and the last of the video."""
    frames = as_frames(resized(noise(*RAW_SHAPES[0]), 32))
    frames = replace(frames, times_s=torch.tensor(INDICES, dtype=torch.float64) / RATE)
    patches = to_patches(frames, video_format=QWEN3_VL)
    example = Example("e", "ask", "/v.mp4", QUESTION, 8.0, IntervalTruth(((1.0, 2.0),)))
    tasks: Any = {"ask": SimpleNamespace(question=lambda example: example.query)}
    builder = PromptBuilder(load_tokenizer("tiny"), tasks, lambda _: patches, video_first=True, writes_times=True)
    ids, special = answers["prompts"][0], builder.special_ids
    first, last = ids.index(special.vision_start), len(ids) - 1 - ids[::-1].index(special.vision_end)
    assert ids[last - 1] == special.vision_end
    assert builder.build(example).token_ids_L.tolist() == [*ids[:first], *ids[first + 1 : last], *ids[last + 1 :]]
