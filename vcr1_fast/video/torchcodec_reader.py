"""torchcodec as a reader: FFmpeg through PyTorch's own decoder, in this process, in its exact mode.

Its frames are found by number and every one is checked by its time against PyAV's list of the shown frames. What it
cannot tell: a frame that FFmpeg repaired after damage looks to it like any other. PyAV refuses those.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, UnsuitedError, require_video_file

NUM_FRAMES_AT_ONCE = 8  # 50 MB of 1080p; the decoder goes on from one batch to the next without seeking
MAX_TIME_ERROR_S = 1e-4  # a tick of MPEG's 90 kHz clock is 1.1e-5 s, the time between two frames 4e-3 s or more


class TorchcodecReader:
    """Stateless, so any number of threads may share one."""

    def __init__(self, max_source_pixels: int = VideoConfig.max_source_pixels) -> None:
        """Raises ModuleNotFoundError when torchcodec is not installed, RuntimeError when it does not load."""
        reason = unavailable_reason()
        if reason is not None:
            is_missing = "not installed" in reason
            raise (ModuleNotFoundError if is_missing else RuntimeError)(f"video.reader is torchcodec, but {reason}")
        import torchcodec

        version = importlib.metadata.version("torchcodec")
        self.name = f"torchcodec {version} (FFmpeg {torchcodec.ffmpeg_major_version})"  # pyright: ignore[reportPrivateImportUsage]
        self._pyav = PyavReader(max_source_pixels)

    def probe(self, path: str) -> Probe:
        """See `Reader.probe`. Times come from PyAV; files of which torchcodec would give wrong frames are refused."""
        probe = self._pyav.probe(path)
        if probe.ticks is None:  # AVI, raw streams, interlaced video
            raise UnsuitedError(
                path,
                "its packets do not say when their frames are shown, which torchcodec needs; set video.reader to pyav",
            )
        # torchcodec 0.13 believes in full range by the name of the pixel format only, and is else 13 levels off.
        if probe.is_full_range and probe.pixel_format.startswith("yuv") and not probe.pixel_format.startswith("yuvj"):
            raise UnsuitedError(
                path, "its colours use the full range, which torchcodec takes for limited; set video.reader to pyav"
            )
        if not probe.is_turned_only:
            raise UnsuitedError(
                path, "is to be shown mirrored or slanted, torchcodec only turns; set video.reader to pyav"
            )
        return probe

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`. Raises SampleError also when torchcodec sees other frames than are shown."""
        require_video_file(probe.path)
        indices = [int(index) for index in frame_indices]
        try:
            decoder = self._open(probe)
            for start in range(0, len(indices), NUM_FRAMES_AT_ONCE):
                some = indices[start : start + NUM_FRAMES_AT_ONCE]
                batch = decoder.get_frames_at(some)
                _require_times(probe, some, batch.pts_seconds.numpy() - decoder.metadata.begin_stream_seconds)
                rgb_FHW3 = batch.data.numpy()
                if rgb_FHW3.shape[1:] != (probe.height_px, probe.width_px, 3):
                    raise UnsuitedError(
                        probe.path,
                        f"torchcodec gives frames of {rgb_FHW3.shape[2]} x {rgb_FHW3.shape[1]} px, wanted "
                        f"{probe.width_px} x {probe.height_px}; set video.reader to pyav",
                    )
                yield from rgb_FHW3
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SampleError(probe.path, f"torchcodec cannot decode it, it is damaged? ({reason})") from error

    def close(self) -> None:
        """Nothing is held between calls."""

    def _open(self, probe: Probe) -> Any:
        """The decoder of the track that was probed. Raises SampleError when it counts other frames."""
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        decoder = VideoDecoder(
            f"file:{probe.path}",  # as PyAV does: a colon in the name is no protocol
            stream_index=probe.stream_index,
            dimension_order="NHWC",
            num_ffmpeg_threads=0,  # FFmpeg's own choice
            device="cpu",
            seek_mode="exact",
        )
        if len(decoder) != len(probe.times_s):
            raise UnsuitedError(
                probe.path,
                f"torchcodec sees {len(decoder)} frames where {len(probe.times_s)} are shown and would give the wrong "
                "ones; set video.reader to pyav, or convert the file",
            )
        return decoder


def unavailable_reason() -> str | None:
    """Why torchcodec cannot be used in this process, and what to do; None when it can."""
    try:
        version = importlib.metadata.version("torchcodec")
    except importlib.metadata.PackageNotFoundError:
        return "torchcodec is not installed: pip install vcr1-fast[torchcodec], or set video.reader to pyav"
    try:
        import torchcodec.decoders  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        cause = str(error).split("\n", 1)[0].rstrip(". ")
        return (
            f"torchcodec {version} does not load ({cause}): it needs FFmpeg's shared libraries, version 4 to 8 "
            "(apt install ffmpeg), and a release that fits this torch; or set video.reader to pyav"
        )
    return None


def _require_times(probe: Probe, indices: list[int], got_s: np.ndarray) -> None:
    wanted_s = probe.times_s[indices]
    wrong = np.flatnonzero(np.abs(got_s - wanted_s) > MAX_TIME_ERROR_S)
    if wrong.size:
        raise UnsuitedError(
            probe.path,
            f"torchcodec gives the frame of {got_s[wrong[0]]:.3f} s where that of {wanted_s[wrong[0]]:.3f} s is "
            "wanted; set video.reader to pyav",
        )
