"""A prompt in which the time of each pair of frames is written before it."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tests.conftest import make_example, make_patches
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Prompt
from vcr1_fast.video.formats import QWEN2_5_VL, VideoFormat


def timed_prompt(
    tokenizer: PreTrainedTokenizerBase,
    grid: tuple[int, int, int] = (3, 4, 4),
    seed: int = 4,
    video_format: VideoFormat = QWEN2_5_VL,
) -> Prompt:
    patches = make_patches(grid, 1.0, seed, video_format.patch_values)
    patches = replace(patches, pair_times_s=tuple(0.5 + pair for pair in range(grid[0])))
    tasks = make_tasks(TaskConfig(), ["temporal_grounding"])
    builder = PromptBuilder(tokenizer, tasks, lambda _: patches, writes_times=True)
    return builder.build(make_example("timed", task="temporal_grounding"))
