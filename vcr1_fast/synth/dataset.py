"""Writes a synthetic data set: real H.264 files and their annotations."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vcr1_fast.settings.config import ConfigError
from vcr1_fast.synth.annotations import (
    Row,
    choice_row,
    grounded_qa_row,
    grounding_row,
    image_row,
    quality_row,
    text_row,
    tracking_row,
)
from vcr1_fast.synth.config import ALL_KINDS, Kind, SynthConfig
from vcr1_fast.synth.render import Pixels, Renderer
from vcr1_fast.synth.scene import (
    Scene,
    sample_grounding_scene,
    sample_quality_scene,
    sample_tracking_scene,
)
from vcr1_fast.video.draw import write_png

_MAKERS: dict[Kind, tuple[Callable[..., Scene], Callable[..., Row]]] = {
    "grounding": (sample_grounding_scene, grounding_row),
    "tracking": (sample_tracking_scene, tracking_row),
    "grounded_qa": (sample_grounding_scene, grounded_qa_row),
    "choice": (sample_grounding_scene, choice_row),
    "quality": (sample_quality_scene, quality_row),
    "image": (sample_grounding_scene, image_row),
    "text": (sample_grounding_scene, text_row),
}
_SPLITS = ("train", "eval")
_MIN_CLIPS_FOR_WORKERS = 64


@dataclass(frozen=True)
class SynthSummary:
    """What was written."""

    output_dir: Path
    num_clips: int
    num_video_bytes: int
    annotation_files: tuple[Path, ...]  # train_grounding, ..., eval_grounding, ...: one of each kind and split


def write_dataset(config: SynthConfig, show_progress: bool = True) -> SynthSummary:
    """Write `videos/` and one JSONL file per split and kind.

    Existing files of the same names are replaced. Raises ConfigError when output_dir cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        for split in _SPLITS:
            for path in _annotation_paths(config, split):
                path.touch()
    except OSError as error:
        raise ConfigError(
            f"output_dir is {config.output_dir}, which cannot be written ({error.strerror}): name another folder"
        ) from error
    counts = {"train": config.num_train, "eval": config.num_eval}
    jobs = [
        (config, split, kind, index) for split in _SPLITS for kind in config.kinds for index in range(counts[split])
    ]
    rows: dict[tuple[str, str], list[Row]] = {(split, kind): [] for split in _SPLITS for kind in config.kinds}
    num_bytes = 0
    columns = (TextColumn("synthetic clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress, transient=True) as progress, _workers(len(jobs)) as run_all:
        bar = progress.add_task("", total=len(jobs))
        for (_, split, kind, _), (row, num_video_bytes) in zip(jobs, run_all(_write_clip, jobs), strict=True):
            rows[split, kind].append(row)
            num_bytes += num_video_bytes
            progress.advance(bar)
    files = tuple(path for split in _SPLITS for path in _annotation_paths(config, split))
    for path, written in zip(files, rows.values(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return SynthSummary(folder, len(jobs), num_bytes, files)


@contextmanager
def _workers(num_clips: int) -> Iterator[Callable[..., Iterable[tuple[Row, int]]]]:
    """A `map` over all cores; for few clips in this process, where starting others would take longer (0.3 s)."""
    if num_clips < _MIN_CLIPS_FOR_WORKERS:
        yield map
        return
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield functools.partial(pool.map, chunksize=4)


def make_clip(config: SynthConfig, split: str, kind: Kind, index: int) -> tuple[Scene, Row]:
    """Scene and annotation row of one clip, without rendering it. Independent of all other clips.

    split: `train` (labels as late, loose and careless as configured) or `eval` (exact labels).
    """
    rng = np.random.default_rng([config.seed, _SPLITS.index(split), ALL_KINDS.index(kind), index])
    if split != "train":
        config = replace(config, label_lag_s=0.0, label_slack_frac=0.0, label_careless_frac=0.0)
    clip_id = f"{split}-{kind}-{index:05d}"
    file = f"videos/{clip_id}.{'png' if kind == 'image' else 'mp4'}"
    sample_scene, make_row = _MAKERS[kind]
    scene = sample_scene(config, rng)
    return scene, make_row(config, scene, clip_id, file, rng)


def write_mp4(path: Path, frames: Iterable[Pixels], width_px: int, height_px: int, fps: float) -> None:
    """Encode [H, W, 3] uint8 frames as H.264 (yuv420p, constant frame rate, one thread so that runs agree).

    Raises av.FFmpegError when the file cannot be written.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        # x264 with AVX2 or AVX-512 gives other bytes for the same pixels in some runs; with SSE2 it did not in 60.
        stream.options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "asm=sse2"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _write_clip(job: tuple[SynthConfig, str, Kind, int]) -> tuple[Row, int]:
    """Render and encode one clip or image; its annotation and the size of its file in bytes."""
    config, split, kind, index = job
    scene, row = make_clip(config, split, kind, index)
    renderer = Renderer(scene, config.noise)
    if kind == "text":
        return row, 0
    path = Path(config.output_dir) / str(row.get("image") or row["video"])
    if kind == "image":
        write_png(renderer.frame(sum(scene.target.visible_s) / 2), path)
        return row, path.stat().st_size
    frames = (renderer.frame(k / config.fps) for k in range(config.num_frames))
    write_mp4(path, frames, config.width_px, config.height_px, config.fps)
    return row, path.stat().st_size


def _annotation_paths(config: SynthConfig, split: str) -> list[Path]:
    return [Path(config.output_dir) / f"{split}_{kind}.jsonl" for kind in config.kinds]
