"""decord, the reader the original training used, in a process that can be killed.

decord can loop for ever inside C++ while it holds the GIL (a container that lists more frames than it has), so no
thread and no signal handler of its own process can stop it. So it is read with in worker processes only
(`read.num_processes`), which end when a clip takes longer than video.timeout_s.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, require_video_file

PART_BYTES = 256 << 20  # of frames that are held at once, see `read`; 41 of 1080p
MAGIC_BYTES = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"), (0, b"\x1aE\xdf\xa3"))


class DecordReader:
    """Stateless, so any number of threads may share one. Imports decord when it first reads."""

    def __init__(self, max_source_pixels: int = VideoConfig.max_source_pixels) -> None:
        """Raises ModuleNotFoundError when decord is not installed."""
        try:
            self.name = f"decord {importlib.metadata.version('decord')}"
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(
                "video.reader is decord, but decord is not installed: pip install decord, or set video.reader to pyav"
            ) from error
        self._pyav = PyavReader(max_source_pixels)

    def probe(self, path: str) -> Probe:
        """See `Reader.probe`. Times come from PyAV, and a file of which decord gives wrong frames is refused.

        Measured with decord 0.6.0: AVI gives frames up to 30 places off, MPEG-TS starts at its second keyframe, and
        the frames that an edit list hides are counted, with other frames in their place. What it cannot tell: a frame
        that FFmpeg repaired after damage looks to it like any other. PyAV refuses those.
        """
        probe = replace(self._pyav.probe(path), ticks=None)
        _require_mp4_or_matroska(path)
        if not probe.is_turned_only:
            raise SampleError(path, "is to be shown mirrored or slanted, decord only turns; set video.reader to pyav")
        with _opened(path) as video:
            height_px, width_px = video[0].shape[:2]
            got = (len(video), width_px, height_px)
        wanted = (len(probe.times_s), probe.width_px, probe.height_px)
        if got != wanted:
            raise SampleError(
                path,
                "decord sees {} frames of {} x {} px where {} of {} x {} are shown (an edit list?) and would give the "
                "wrong ones; set video.reader to pyav, or convert the file".format(*got, *wanted),
            )
        return probe

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`.

        Once it has given a frame, decord decodes on in the background and keeps what it decodes, up to the whole file:
        250 MB a second at 1280 x 720 for as long as nobody asks it for more, as while frames are resized. So some are
        fetched, then it goes back to the start, which empties its queue. A further part costs the way from its last
        keyframe.
        """
        require_video_file(probe.path)
        indices = [int(index) for index in frame_indices]
        num_at_once = max(1, PART_BYTES // (3 * probe.height_px * probe.width_px))
        with _opened(probe.path) as video:
            for start in range(0, len(indices), num_at_once):
                rgb_FHW3 = video.get_batch(indices[start : start + num_at_once]).asnumpy()
                video.seek(0)
                yield from rgb_FHW3

    def close(self) -> None:
        """Nothing is held between calls."""


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """decord's reader of a file; what it raises meanwhile becomes a SampleError."""
    import decord

    try:
        yield decord.VideoReader(path)  # threads: decord's own choice
    except Exception as error:  # its own class, RuntimeError, IndexError
        raise SampleError(path, _in_plain_words(str(error))) from error


def _require_mp4_or_matroska(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    if not any(start[offset:].startswith(magic) for offset, magic in MAGIC_BYTES):
        raise SampleError(
            path,
            "is not an MP4, MOV, Matroska or WebM file, and decord gives wrong frames of others (AVI, MPEG-TS); "
            "set video.reader to pyav",
        )


def _in_plain_words(reason: str) -> str:
    """One line without the times and source lines of decord's C++ traces."""
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", reason.split("Stack trace")[0])
    return f"decord cannot decode it: {' '.join(text.split())[:200]}"
