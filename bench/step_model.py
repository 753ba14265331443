"""The models that the step benchmark updates, and the points it measures.

`3B` is Qwen2.5-VL-3B with random weights, built from the public numbers of its configuration: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.groups import random_group
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.learner.tower_attention import use_tower_attention
from vcr1_fast.types import RolloutGroup


@dataclass(frozen=True)
class StepPoint:
    """One workload: a video of `grid` patches in a prompt with `num_text` words, and G completions of R tokens."""

    model: str
    grid: tuple[int, int, int]
    num_text: int
    completion_len: int
    num_completions: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def prompt_len(self) -> int:
        return self.num_text + self.num_patches // 4

    @property
    def name(self) -> str:
        return f"{self.model} P={self.prompt_len} R={self.completion_len} G={self.num_completions}"

    def group(self, video_token_id: int, device: torch.device, dtype: torch.dtype) -> RolloutGroup:
        """The random group, its patches already on the device: copying pixels is not part of an update here."""
        lens = (self.completion_len,) * self.num_completions
        group = random_group(self.grid, self.num_text, lens, video_token_id)
        values_PC = group.prompt.media[0].values_PC.to(device=device, dtype=dtype)
        object.__setattr__(group.prompt.media[0], "values_PC", values_PC)
        return group


TINY_POINTS = [
    StepPoint("tiny", (8, 8, 8), 60, 60, 8),
    StepPoint("tiny", (32, 8, 8), 60, 60, 8),
    StepPoint("tiny", (64, 8, 8), 60, 60, 8),
    StepPoint("tiny", (64, 8, 8), 60, 240, 8),
    StepPoint("tiny", (32, 8, 8), 60, 60, 2),
]
TINY_CHECK = StepPoint("tiny", (4, 8, 8), 30, 12, 3)
# 30 frame pairs of 10 x 12 tokens: the video budget of the original recipe; 64 pairs of 16 x 16 tokens
GPU_POINTS = [
    StepPoint("3B", (30, 20, 24), 112, 300, 8),
    StepPoint("3B", (64, 32, 32), 128, 512, 8),
]
GPU_CHECK = StepPoint("3B", (4, 20, 24), 64, 64, 4)


def config_3b() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(**whole_config(PUBLIC_SIZES["Qwen2.5-VL-3B"]))


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """`tiny` from the package, `3B` with random weights made on the device. In training mode; no dropout is in it."""
    if name == "tiny":
        hf = load_hugging_face("tiny", dtype, device)
    else:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        try:
            with torch.device(device):
                hf = Qwen2_5_VLForConditionalGeneration(config_3b())
        finally:
            torch.set_default_dtype(default)
    if device.type == "cuda":
        use_tower_attention(hf.model.visual, "flash")  # for every way alike: the original had flash-attn
    return hf.train()
