"""What a video reader is, and what every reader does alike: checks before it opens a file, turning frames upright."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vcr1_fast.types import RunError, SampleError


@dataclass(frozen=True, slots=True)
class Probe:
    """What can be known of a video without turning its N frames into pictures.

    Only frames that a player shows are counted: pictures that an edit list hides are not among the N.
    """

    path: str
    times_s: np.ndarray  # [N] float64, ascending, seconds after the first shown frame, so times_s[0] is 0
    width_px: int  # as displayed, that is after the rotation the file asks for
    height_px: int
    duration_s: float  # first frame's start to last frame's end
    ticks: np.ndarray | None = None  # [N] int64, timestamps to find the frames by; None: find them by their order
    codec: str = ""  # FFmpeg's name, for example "h264"; empty for a folder of images
    stream_index: int = 0  # of the video track among all tracks of the file
    pixel_format: str = ""  # FFmpeg's name, for example "yuv420p"
    is_full_range: bool = False  # luma and chroma use all 256 levels, by what file or video says
    is_turned_only: bool = True  # upright by 0 to 3 quarter turns; False: the file asks for a mirror image, or for more
    decoded_by: str = ""  # name of the one that reads it, where a reader chooses between two by the file
    images: tuple[str, ...] = ()  # file names of the N frames, for a folder of images


class ReaderError(RunError):
    """The reader cannot go on, and no file is to blame: no memory on the GPU, a worker that does not start."""


class UnsuitedError(SampleError):
    """A file that a reader would give wrong frames of, or none, and that PyAV may be right for.

    `probe`: PyAV's, where the reader has it.
    """

    def __init__(self, source: str, reason: str, probe: Probe | None = None) -> None:
        super().__init__(source, reason)
        self.probe = probe


class Reader(Protocol):
    """Implementations: the modules *_reader of this folder. Each may be used by several threads."""

    @property
    def name(self) -> str:
        """Name and version of what decodes, for example "pyav 18.1.0"."""
        ...

    def probe(self, path: str) -> Probe:
        """Presentation times and displayed size. Raises SampleError, and nothing else, for a file it cannot use:
        UnsuitedError where another reader can.

        Frames with more than video.max_source_pixels are refused here, before one is decoded.
        """
        ...

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """One upright rgb_HW3 (uint8) per entry of `frame_indices`: ascending, in 0..N-1, repeats allowed.

        One frame at a time, because 768 frames of 1080p would take 4.8 GB at once. Raises SampleError when a
        wanted frame cannot be decoded; another frame is never put in its place.
        """
        ...

    def close(self) -> None:
        """Free what the reader holds (worker processes)."""
        ...


def require_video_file(path: str) -> None:
    """Raise SampleError unless `path` is a regular, readable file that is not empty."""
    try:
        if not os.path.lexists(path):
            raise SampleError(path, "no such file; check data.video_root and the annotation")
        if not Path(path).is_file():
            raise SampleError(path, "is not a regular file, wanted a video file")
        if Path(path).stat().st_size == 0:
            raise SampleError(path, "the file is empty (0 bytes); fetch it again")
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise SampleError(path, f"the file cannot be opened: {error}") from error


def require_pixels(
    path: str, width_px: int, height_px: int, max_source_pixels: int, *, what: str = "the video"
) -> None:
    """Raise SampleError when a frame has no size or more than `max_source_pixels`: it is too much memory to decode."""
    if width_px < 1 or height_px < 1:
        raise SampleError(path, f"{what} states a size of {width_px} x {height_px} px; fetch it again")
    if width_px * height_px > max_source_pixels:
        raise SampleError(
            path,
            f"{what} has frames of {width_px} x {height_px} px, more than video.max_source_pixels "
            f"({max_source_pixels}); shrink it, or raise the limit",
        )


def decoder_limit(max_source_pixels: int) -> dict[str, str]:
    """Option for a codec, for what says less than it has. Twice, as FFmpeg counts with sides rounded up to 64."""
    return {"max_pixels": str(2 * max_source_pixels + (1 << 16))}


def upright(rgb_HW3: np.ndarray, is_transposed: bool, is_mirrored: bool, is_flipped: bool) -> np.ndarray:
    """Transpose, mirror left-right, flip top-bottom, in that order; contiguous."""
    if is_transposed:
        rgb_HW3 = rgb_HW3.transpose(1, 0, 2)
    if is_mirrored:
        rgb_HW3 = rgb_HW3[:, ::-1]
    if is_flipped:
        rgb_HW3 = rgb_HW3[::-1]
    return np.ascontiguousarray(rgb_HW3)
