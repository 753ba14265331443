"""Writes a synthetic data set: real H.264 files and their annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vcr1_fast.config import ConfigError
from vcr1_fast.synth.annotations import Row, grounding_row, tracking_row
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.render import Pixels, Renderer
from vcr1_fast.synth.scene import Scene, sample_grounding_scene, sample_tracking_scene

_SPLITS = ("train", "eval")
_KINDS = ("grounding", "tracking")


@dataclass(frozen=True)
class SynthSummary:
    """What was written."""

    output_dir: Path
    num_clips: int
    num_video_bytes: int
    annotation_files: tuple[Path, ...]  # train_grounding, train_tracking, eval_grounding, eval_tracking


def write_dataset(config: SynthConfig, show_progress: bool = True) -> SynthSummary:
    """Write `videos/` and one JSONL file per split and task.

    Existing files of the same names are replaced. Raises ConfigError when output_dir cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        for split in _SPLITS:
            for path in _annotation_paths(folder, split):
                path.touch()
    except OSError as error:
        raise ConfigError(
            f"output_dir is {config.output_dir}, which cannot be written ({error.strerror}): name another folder"
        ) from error
    columns = (TextColumn("synthetic clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    num_clips = len(_KINDS) * (config.num_train + config.num_eval)
    num_bytes = 0
    with Progress(*columns, disable=not show_progress, transient=True) as progress:
        bar = progress.add_task("", total=num_clips)
        for split in _SPLITS:
            for kind, path in zip(_KINDS, _annotation_paths(folder, split), strict=True):
                rows: list[Row] = []
                for index in range(config.num_train if split == "train" else config.num_eval):
                    row, num_video_bytes = _write_clip(config, folder, split, kind, index)
                    rows.append(row)
                    num_bytes += num_video_bytes
                    progress.advance(bar)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = tuple(path for split in _SPLITS for path in _annotation_paths(folder, split))
    return SynthSummary(folder, num_clips, num_bytes, files)


def make_clip(config: SynthConfig, split: str, kind: str, index: int) -> tuple[Scene, Row]:
    """Scene and annotation row of one clip, without rendering it. Independent of all other clips.

    split: `train` (labels as late and loose as configured) or `eval` (exact labels). kind: `grounding` or `tracking`.
    """
    rng = np.random.default_rng([config.seed, _SPLITS.index(split), _KINDS.index(kind), index])
    labels = config if split == "train" else replace(config, label_lag_s=0.0, label_slack_frac=0.0)
    clip_id = f"{split}-{kind}-{index:05d}"
    video = f"videos/{clip_id}.mp4"
    if kind == "grounding":
        scene = sample_grounding_scene(config, rng)
        return scene, grounding_row(labels, scene, clip_id, video, rng)
    scene = sample_tracking_scene(config, rng)
    return scene, tracking_row(labels, scene, clip_id, video, rng)


def write_mp4(path: Path, frames: Iterable[Pixels], width_px: int, height_px: int, fps: float) -> None:
    """Encode [H, W, 3] uint8 frames as H.264 (yuv420p, constant frame rate, one thread so that runs agree).

    Raises av.FFmpegError when the file cannot be written, ValueError when a frame has another size.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        # x264 with AVX2 or AVX-512 gives other bytes for the same pixels in some runs; with SSE2 it did not in 60.
        stream.options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "asm=sse2"}
        for pixels in frames:
            if pixels.shape != (height_px, width_px, 3):
                raise ValueError(f"{path}: a frame has shape {pixels.shape}, wanted {(height_px, width_px, 3)}")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _write_clip(config: SynthConfig, folder: Path, split: str, kind: str, index: int) -> tuple[Row, int]:
    """Render and encode one clip; its annotation and the size of its file in bytes."""
    scene, row = make_clip(config, split, kind, index)
    renderer = Renderer(scene, config.noise)
    path = folder / str(row["video"])
    frames = (renderer.frame(k / config.fps) for k in range(config.num_frames))
    write_mp4(path, frames, config.width_px, config.height_px, config.fps)
    return row, path.stat().st_size


def _annotation_paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}_grounding.jsonl", folder / f"{split}_tracking.jsonl"
