"""`vcr1-fast train --dry-run[=GPUS]`: what a run will take, before anything is loaded: tokens, memory, seconds, disk.

The worst step that the settings allow runs on GPUs that are played (dry_run.py). With --fast, and where none can be
played, the sums of learner/memory_sums.py stand in, and the plan says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vcr1_fast.commands.data import NO_SUCH_FILE, FileCheck, check_files
from vcr1_fast.commands.dry_run import Measured, measure
from vcr1_fast.fake_gpu.shim import FakeGpuError
from vcr1_fast.learner.memory_sums import (
    ADVICE,
    GPUS_GB,
    SMALLEST_GPU_GB,
    TEXT_TOKENS,
    TokenPlan,
    clip_tokens,
    largest_group,
    plan_memory,
    plan_tokens,
    reduces_once,
    trained_params,
    with_recompute,
)
from vcr1_fast.learner.model_size import ModelSize, model_size, read_model_config
from vcr1_fast.run.hub import with_hub_config
from vcr1_fast.run.telemetry import console, is_main_rank, say
from vcr1_fast.settings.checks import check_settings
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.of_model import check_model
from vcr1_fast.tasks import make_tasks
from vcr1_fast.video.source_name import SourceName

DEFAULT_NUM_GPUS = 8
SHOWN_CLIPS_S = (10, 30, 120, 384)


def default_num_gpus(config: Config) -> int:
    """WORLD_SIZE under torchrun; else 8, or 1 for settings that do not divide by 8."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        check_settings(config, "train", DEFAULT_NUM_GPUS)
    except ConfigError:
        return 1
    return DEFAULT_NUM_GPUS


def plan_command(config: Config, num_gpus: int | None = None, is_fast: bool = False) -> dict[str, Any]:
    """Prints the plan, returns what its JSON line says. `is_fast`: sums alone, at once.

    Raises ConfigError when settings fit neither that number of GPUs nor the model, or its family is not known.
    """
    num_gpus = num_gpus or default_num_gpus(config)
    check_settings(config, "train", num_gpus)
    try:
        config = with_hub_config(config)
    except ConfigError as error:  # without a network, or a model as yet, public sizes stand in, which the plan says
        say(str(error))
    check_model(config)
    model, source = read_model_config(config.model.path)
    size = model_size(model, source)
    tokens = plan_tokens(config, num_gpus, size.video.factor_px)
    config = with_recompute(config, size, num_gpus, SMALLEST_GPU_GB)
    once = reduces_once(config, size, num_gpus, SMALLEST_GPU_GB)
    has_rows = num_gpus > 1 and tokens.groups_per_gpu > tokens.groups_per_row
    sums = plan_memory(config, size, tokens, num_gpus, has_whole_gradients=once and has_rows)
    decided = replace(config, train=replace(config.train, reduce_gradients="once" if once else "each_row"))
    measured = None if is_fast else _measured(decided, model, size, tokens, num_gpus)
    memory = measured.phases if measured else sums.by_phase()
    phases = {phase: round(sum(kinds.values()), 2) for phase, kinds in memory.items()}
    too_large = {gpu: [name for name, gb in phases.items() if gb > room] for gpu, room in GPUS_GB.items()}
    smallest = replace(config, model=replace(config.model, gradient_checkpointing="full"))
    held = {gpu: largest_group(smallest, size, tokens, num_gpus, gb) for gpu, gb in GPUS_GB.items()}
    disk, checks = disk_gb(config, size), _checks(config)
    missing_files, missing_videos = _missing(config, checks)
    staging = 0.0 if config.checkpoint.asynchronous is False else round(checkpoint_bytes(config, size) / 1e9, 2)
    if is_main_rank():
        say(f"model: {size.params:,} parameters ({source}); recomputed: {config.model.gradient_checkpointing}")
        console.print(_token_table(config, tokens, size.video.factor_px))
        console.print(_memory_table(memory))
        _print_limits(phases, too_large)
        holds = "; ".join(f"{gpu}: {most:,}" for gpu, most in held.items())
        say(f"largest group that a GPU holds, all recomputed, in tokens (by sums; it is never split): {holds}")
        if measured:
            _print_prediction(measured, config)
        on_disk = ", ".join(f"{name} {gb:.1f}" for name, gb in disk.items())
        say(f"disk, GB: {on_disk}; ranks, each with a GPU: {num_gpus}")
        say(f"host memory for checkpoints, GB: {staging:.1f} over all machines ({staging / num_gpus:.1f} a rank)")
        _say_of_data(missing_files, missing_videos, _shown_beyond(config, checks, tokens.video, size.video.factor_px))
    return {
        "model": source,
        "num_params": size.params,
        "num_gpus": num_gpus,
        "steps": config.train.num_steps,
        "tokens": asdict(tokens),
        "is_measured": measured is not None,
        "memory_gb": memory,
        "phases_gb": phases,
        "exceeds": too_large,
        "largest_group": held,
        "predicted": measured.predicted if measured else None,
        "learner": measured.learner if measured else None,
        "disk_gb": disk,
        "staging_gb": staging,
        "missing_files": missing_files,
        "missing_videos": missing_videos,
    }


def _measured(
    config: Config, model: Mapping[str, Any], size: ModelSize, tokens: TokenPlan, num_gpus: int
) -> Measured | None:
    """The step on fake GPUs; None, and a line that says why, where it cannot be run."""
    try:
        return measure(config, model, size, tokens, num_gpus)
    except FakeGpuError as error:
        say(f"no step was run on fake GPUs ({error}); sums over the model's sizes stand in")
        return None


def checkpoint_bytes(config: Config, size: ModelSize) -> int:
    """Float32 weights and two moments of what is trained."""
    return 12 * trained_params(config, size)


def disk_gb(config: Config, size: ModelSize) -> dict[str, float]:
    """Checkpoints: `checkpoint.keep` of them, the best one and the one being written. Export: every weight in bfloat16,
    as public checkpoints have them, unless `checkpoint.export_dtype` says float32."""
    width = 4 if config.checkpoint.export_dtype == "float32" else 2
    num_kept = config.checkpoint.keep + (config.checkpoint.keep_best is not None)
    checkpoints = checkpoint_bytes(config, size) * (num_kept + 1)
    export = width * size.params if config.checkpoint.export else 0
    return {"checkpoints": round(checkpoints / 1e9, 2), "export": round(export / 1e9, 2)}


def _prompt_files(config: Config) -> dict[str, str]:
    """Task -> its file of task.prompts, of those that exist."""
    return {task: file for task, file in config.task.prompts.items() if Path(file).expanduser().is_file()}


def _checks(config: Config) -> list[FileCheck]:
    """Of the annotation files. Raises ConfigError for one that is there and cannot be used."""
    checks = check_files(config, make_tasks(replace(config.task, prompts=_prompt_files(config)), judge=config.judge))
    for check in checks:
        if check.problem not in ("", NO_SUCH_FILE):
            raise ConfigError(check.problem)
    return checks


def _missing(config: Config, checks: Sequence[FileCheck]) -> tuple[list[str], int]:
    """Annotation and prompt files that do not exist, and how many videos and images that the former name do not."""
    asked = _prompt_files(config)
    gone = [check.path for check in checks if check.content is None]
    gone += [file for task, file in config.task.prompts.items() if task not in asked]
    return gone, len({video for check in checks for video in check.missing})


def _say_of_data(missing_files: Sequence[str], num_missing: int, shown_beyond: str) -> None:
    if missing_files or num_missing:
        say(f"not found: {', '.join(missing_files) or 'no annotation file'}; {num_missing:,} videos or images")
    if shown_beyond:
        say(shown_beyond)


def _shown_beyond(config: Config, checks: Sequence[FileCheck], video_tokens: int, factor_px: int) -> str:
    """A line where rows show more than the one video of `video_tokens` that all sums are of; else ""."""
    image_tokens = config.video.max_image_pixels // factor_px**2
    rows = [row for check in checks if check.content for row in check.content.examples if row.media]
    counts = [(sum(not SourceName.parse(name).is_image for name in row.media), len(row.media)) for row in rows]
    most = max((videos * video_tokens + (shown - videos) * image_tokens for videos, shown in counts), default=0)
    if most <= video_tokens:
        return ""
    return (
        f"of {len(rows):,} rows with images or several videos the largest shows up to {most:,} tokens, and all sums "
        f"here are of one video, {video_tokens:,}: see if the largest group holds it, or set train.max_group_tokens"
    )


def _print_limits(phases: Mapping[str, float], too_large: Mapping[str, list[str]]) -> None:
    for gpu, names in too_large.items():
        for name in names:
            say(f"{name} needs {phases[name]:.0f} GB, more than {gpu}: try {ADVICE[name]}")
        if not names:
            say(f"fits into {gpu}, with {GPUS_GB[gpu] - max(phases.values()):.0f} GB to spare")


def _print_prediction(measured: Measured, config: Config) -> None:
    s, counts = measured.predicted, measured.learner
    say(
        f"predicted by rates that are {measured.rates.source} ({measured.rates.describe()}): a step "
        f"{s['step_s']:.1f} s (rollout {s['rollout_s']:.1f}, update {s['update_s']:.1f}, weights {s['push_s']:.1f}), "
        f"{config.train.num_steps:,} steps {s['run_h']:.1f} h"
    )
    say(
        f"an update on one GPU: {counts['tflop']:,.0f} TFLOP, {counts['launches']:,.0f} launches, "
        f"{counts['collectives']:.0f} collectives, {counts['syncs']:.0f} waits of the host, "
        f"{counts['blocking_copies']:.0f} blocking copies"
    )


def _token_table(config: Config, tokens: TokenPlan, factor_px: int) -> Table:
    table = Table("tokens", "", box=box.SIMPLE)
    table.add_column("", justify="right")
    clips = ", ".join(f"{clip_tokens(s, config.video, factor_px):,} of {s} s" for s in SHOWN_CLIPS_S)
    saved = tokens.unshared_group / tokens.group
    for name, note, value in (
        ("prompt", f"longest video and {TEXT_TOKENS} of text (video: {clips})", tokens.prompt),
        *[("prompt in evaluation", "by eval.video", tokens.eval_prompt)] * (tokens.eval_prompt != tokens.prompt),
        ("completion", "at most", tokens.completion),
        ("group", f"{config.rollout.group_size} completions, one prompt; {saved:.1f} x fewer than apart", tokens.group),
        ("row", f"{tokens.groups_per_row} of {tokens.groups_per_gpu} groups of this GPU in an update", tokens.row),
        ("step", f"{config.train.prompts_per_step} groups, all GPUs", config.train.prompts_per_step * tokens.group),
    ):
        table.add_row(name, note, f"{value:,}")
    return table


def _memory_table(memory: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("GB on each GPU at the peak", box=box.SIMPLE)
    table.add_column("", justify="right")
    for phase, kinds in memory.items():
        for kind, gb in sorted(kinds.items(), key=lambda item: -item[1]):
            table.add_row(f"  {kind}", f"{gb:.1f}")
        table.add_row(f"[bold]{phase}[/]", f"[bold]{sum(kinds.values()):.1f}[/]")
    return table
