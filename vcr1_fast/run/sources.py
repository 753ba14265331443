"""Where the videos of a run's prompts come from, and how long a prompt may be: in training, and in evaluation where
eval.video says otherwise. Called by `run.open_run`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.model import resolve_dtype
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.dataset import AnnotationFile, AnnotationSource, read_annotation_files
from vcr1_fast.prompts.limits import PromptLimits
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.checks import RunCommand
from vcr1_fast.settings.config import Config
from vcr1_fast.tasks.task import Task
from vcr1_fast.video.cache import IMAGE_FIELDS, PIXEL_FIELDS, TensorCache
from vcr1_fast.video.frozen_tower import FrozenTower, load_frozen_tower
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.patches import PatchSource

SEEN_FIELDS = PIXEL_FIELDS + IMAGE_FIELDS


def prompt_limits(config: Config, command: RunCommand) -> PromptLimits:
    """Raises ConfigError when the model's config.json is unusable."""
    max_positions = read_config(model_folder(config.model.path)).get_text_config().max_position_embeddings
    num_answer_tokens, max_prompt_tokens = config.rollout.max_new_tokens, config.data.max_prompt_tokens
    if command == "sft":
        num_answer_tokens = 0  # its answers are there, and are counted
    elif command == "eval":
        num_answer_tokens = config.eval.max_new_tokens or num_answer_tokens
        if not config.eval.video.given.keys().isdisjoint(SEEN_FIELDS):  # to see more than training may
            max_prompt_tokens = None
    is_fixed = config.task.recipe == "fixed"
    return PromptLimits(max_positions, num_answer_tokens, max_prompt_tokens, refuses_periods=is_fixed)


def tokens_per_second(config: Config) -> float:
    """Positions that the model counts for a second of video; any for Qwen3-VL, which is told times in words."""
    return getattr(read_config(model_folder(config.model.path)).vision_config, "tokens_per_second", 0.0)


def annotation_contents(
    config: Config, tasks: Mapping[str, Task], name: Literal["train", "eval"]
) -> list[AnnotationFile]:
    """Of the files of data.train or data.eval. Raises ConfigError as `read_annotation_files` does."""
    files = config.data.sources(name)
    sources = [AnnotationSource(file.path, file.video_root, file.format or "auto", file.task) for file in files]
    return read_annotation_files(sources, tasks, config.task.recipe)


def open_source(
    config: Config, device: torch.device, kernels: KernelChoice | None = None, tower: FrozenTower | None = None
) -> PatchSource:
    """Reader, workers, cache and, where it is frozen, the vision tower: `tower` if it is loaded. To be closed."""
    video, dtype = config.video, resolve_dtype(config.model, device)
    folder = Path(video.cache_dir).expanduser() if video.cache_dir else None
    cache = TensorCache(folder, int(video.cache_ram_gib * 2**30), int(video.cache_disk_gib * 2**30))
    loader = FrameLoader(video, cache=cache, pin_memory=device.type == "cuda")
    if tower is None and config.model.is_tower_frozen:
        tower = load_frozen_tower(model_folder(config.model.path), dtype, device, kernels)
    video_format = family_of(read_config(model_folder(config.model.path))).video
    return PatchSource(loader, cache, video, device, dtype, tower, kernels, video_format)


@contextlib.contextmanager
def eval_builder(
    config: Config, builder: PromptBuilder, source: PatchSource, kernels: KernelChoice
) -> Iterator[PromptBuilder]:
    """`builder` itself where evaluation sees what training does, else one that reads as eval.video says.

    Other frames and sizes come from the readers and caches of `source`; other readers, workers or caches are opened
    beside them, with the same tower.
    """
    video = config.eval_video
    if video == config.video:
        yield builder
        return
    limits = prompt_limits(config, "eval")
    if all(getattr(video, name) == value for name, value in asdict(config.video).items() if name not in SEEN_FIELDS):
        seen = source.seen_as(video)
        yield builder.reading(seen, seen.prefetch, limits)
        return
    with contextlib.closing(open_source(replace(config, video=video), source.device, kernels, source.tower)) as other:
        yield builder.reading(other, other.prefetch, limits)


def describe_eval_video(config: Config) -> str:
    """A line for the head of a run; "" where evaluation sees what training does."""
    given = ", ".join(f"{name}={value}" for name, value in config.eval.video.given.items())
    return given and f"evaluation sees videos by eval.video: {given}"
