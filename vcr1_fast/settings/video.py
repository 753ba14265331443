"""Settings of the video path, in training and in evaluation: sections of `vcr1_fast.settings.config`, to be imported
from there.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from vcr1_fast.settings.error import ConfigError, require, require_above_0, require_least

ReaderName = Literal[
    "auto",
    "pyav",
    "decord",
    "torchcodec",
    "torchcodec+pyav",
    "torchcodec_cuda",
    "torchcodec_cuda+pyav",
    "dali",
    "dali+pyav",
]


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames the model sees, at what size (rules of the original Qwen2.5-VL recipe), and how they are read."""

    reader: ReaderName = "auto"
    """What decodes. auto: on a GPU a new run measures which of dali+pyav, torchcodec_cuda+pyav (both NVDEC), pyav and
    torchcodec+pyav takes least time for clips of its own, prints it and keeps to it; elsewhere pyav. +pyav: files that
    the other one is not right for are read with pyav, and not refused. Folders of images always are."""
    fps: float = 2.0
    """Frames per second to sample."""
    min_frames: int = 4
    """At least this many frames (even)."""
    max_frames: int = 768
    """At most this many frames (even)."""
    total_pixels: int = 3584 * 28 * 28
    """Pixel budget of a whole video, of which two frames share a token's. Default: 3,584 tokens, of Qwen3-VL as many of
    32 x 32; so are the two bounds below."""
    min_frame_pixels: int = 16 * 28 * 28
    """A frame is scaled up to at least this many pixels."""
    max_frame_pixels: int = 768 * 28 * 28
    """A frame is scaled down to at most this many pixels."""
    max_image_pixels: int = 1280 * 28 * 28
    """An image, which is no frame of a video, is scaled down to at most this many pixels. Default: 1,280 tokens; of
    Qwen3-VL as many of 32 x 32, and so is the bound below."""
    min_image_pixels: int = 4 * 28 * 28
    """An image is scaled up to at least this many pixels."""
    image_folder_fps: float = 2.0
    """Frames per second of a video that is a folder of images; such a folder does not say. VideoChat-R1 declares 2."""
    max_source_pixels: int = 8192 * 8192
    """A file, or an image, whose frames have more pixels is refused: 4 KB of it can ask for gigabytes of memory."""
    timeout_s: float = 60.0
    """A clip that takes longer to read is given up and quarantined; the worker that read it is replaced."""
    num_workers: int = 4
    """Processes per rank that read clips ahead of need. 0: threads of the trainer read them; one that takes longer than
    timeout_s is left to itself and replaced, but a decoder that crashes ends the run. Where the GPU decodes it is one
    process, whatever this is; with decord at least one."""
    prefetch_steps: int = 2
    """How many steps ahead clips are read."""
    clips_per_worker: int = 2000
    """A worker is replaced after so many clips, because decoders leak memory (decord's are known)."""
    cache_dir: str | None = None
    """Folder that keeps decoded clips on disk, shared by runs and ranks. Default: none are kept."""
    cache_disk_gib: float = 100.0
    """Largest size of that folder; the clips used longest ago are dropped."""
    cache_ram_gib: float = 1.0
    """Decoded clips kept in memory, per rank; 0: none."""

    def __post_init__(self) -> None:
        require(self.fps > 0, f"video.fps is {self.fps}, wanted a positive number of frames per second")
        for name in ("min_frames", "max_frames"):
            value = getattr(self, name)
            require(value >= 2 and value % 2 == 0, f"video.{name} is {value}, wanted an even number >= 2")
        require(
            self.min_frames <= self.max_frames,
            f"video.min_frames is {self.min_frames}, more than video.max_frames {self.max_frames}",
        )
        for what in ("frame", "image"):
            low, high = (getattr(self, f"{bound}_{what}_pixels") for bound in ("min", "max"))
            require(
                28 * 28 <= low <= high,
                f"video.min_{what}_pixels is {low}, wanted between 784 and video.max_{what}_pixels {high}",
            )
        require_above_0(self, "video", "image_folder_fps", "timeout_s", "max_source_pixels", "clips_per_worker")
        require_least(self, "video", 0, "num_workers", "prefetch_steps", "cache_disk_gib", "cache_ram_gib")


@dataclass(frozen=True, kw_only=True)
class EvalVideoConfig:
    """What differs from `VideoConfig` in evaluation: training's held-out scores and `vcr1-fast eval`. The help of each
    refers to the section video, see `io.settings_parser`."""

    reader: ReaderName | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None
    min_frame_pixels: int | None = None
    max_frame_pixels: int | None = None
    max_image_pixels: int | None = None
    min_image_pixels: int | None = None
    image_folder_fps: float | None = None
    max_source_pixels: int | None = None
    timeout_s: float | None = None
    num_workers: int | None = None
    prefetch_steps: int | None = None
    clips_per_worker: int | None = None
    cache_dir: str | None = None
    cache_disk_gib: float | None = None
    cache_ram_gib: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left to the section video, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, video: VideoConfig) -> VideoConfig:
        """`video` with these in place of its own. Raises ConfigError, which names them as eval.video.X."""
        try:
            return replace(video, **self.given)
        except ConfigError as error:
            ours = rf"\bvideo\.(?=({'|'.join(self.given)})\b)"
            raise ConfigError(re.sub(ours, "eval.video.", str(error))) from None
