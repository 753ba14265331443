"""What a video reader is, and the check every reader makes before it opens a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vcr1_fast.types import SampleError


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


class Reader(Protocol):
    """Implementations: pyav_reader.PyavReader, decord_reader.DecordReader. Both may be used by several threads."""

    @property
    def name(self) -> str:
        """Name and version of what decodes, for example "pyav 18.1.0"."""
        ...

    def probe(self, path: str) -> Probe:
        """Presentation times and displayed size. Raises SampleError, and nothing else, for a file it cannot use."""
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
        if Path(path).is_dir():
            raise SampleError(path, "is a directory, wanted a video file")
        if not Path(path).is_file():
            raise SampleError(path, "is not a regular file, wanted a video file")
        if Path(path).stat().st_size == 0:
            raise SampleError(path, "the file is empty (0 bytes); fetch it again")
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise SampleError(path, f"the file cannot be opened: {error}") from error
