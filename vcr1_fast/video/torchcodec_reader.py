"""torchcodec as a reader: FFmpeg through PyTorch's own decoder, in its exact mode, or NVDEC through the same.

Its frames are found by number and every one is checked by its time against PyAV's list of the shown frames. What it
cannot tell: a frame that FFmpeg repaired after damage looks to it like any other. PyAV refuses those.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.proof_clip import difference, proof_clip
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, UnsuitedError, require_video_file
from vcr1_fast.video.resolution import resize_frame

NUM_FRAMES_AT_ONCE = 8  # 50 MB of 1080p; the decoder goes on from one batch to the next without seeking
GPU_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")  # that NVDEC knows
GPU_FORMATS = ("yuv420p", "yuvj420p")
MAX_TIME_ERROR_S = 1e-4  # a tick of MPEG's 90 kHz clock is 1.1e-5 s, the time between two frames 4e-3 s or more


class TorchcodecReader:
    """Stateless, so any number of threads may share one.

    On "cuda" it decodes and resizes on the current GPU. Of a codec whose test clip does not come out right there it
    takes no file, nor of what NVDEC gives other than 8-bit 4:2:0.
    """

    def __init__(
        self, max_source_pixels: int = VideoConfig.max_source_pixels, device: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        """Raises ModuleNotFoundError when torchcodec is not installed, RuntimeError when it does not load or `device`
        is a GPU that it does not decode on."""
        reason = unavailable_reason()
        if reason is not None:
            is_missing = "not installed" in reason
            raise (ModuleNotFoundError if is_missing else RuntimeError)(f"video.reader is torchcodec, but {reason}")
        import torchcodec

        version = importlib.metadata.version("torchcodec")
        ffmpeg = torchcodec.ffmpeg_major_version  # pyright: ignore[reportPrivateImportUsage]
        self.name = f"torchcodec {version} (FFmpeg {ffmpeg})"
        self._pyav, self._device = PyavReader(max_source_pixels), device
        self._codecs: tuple[str, ...] | None = None
        if device == "cuda":
            failures = {codec: cuda_failure(codec) for codec in GPU_CODECS}
            self._codecs = tuple(codec for codec, failure in failures.items() if failure is None)
            if not self._codecs:
                raise RuntimeError(
                    f"video.reader is torchcodec_cuda, but torchcodec {version} decodes nothing right on this GPU "
                    f"({GPU_CODECS[0]}: {failures[GPU_CODECS[0]]}): it needs a build for CUDA (PyTorch's index has "
                    "them) and libnvcuvid; or set video.reader to pyav"
                )
            self.name = f"torchcodec_cuda {version} {'+'.join(self._codecs)} (FFmpeg {ffmpeg})"

    def probe(self, path: str) -> Probe:
        """See `Reader.probe`. Times come from PyAV; files of which torchcodec would give wrong frames are refused."""
        probe = self._pyav.probe(path)
        reason = self._refusal(probe)
        if reason is not None:
            raise UnsuitedError(path, f"{reason}; set video.reader to pyav", probe)
        return probe

    def _refusal(self, probe: Probe) -> str | None:
        """Why torchcodec would not give the right frames, in one clause; None: it would."""
        if probe.ticks is None:  # AVI, raw streams, interlaced video
            return "its packets do not say when their frames are shown, which torchcodec needs"
        # torchcodec 0.13 believes in full range by the name of the pixel format only, and is else 13 levels off.
        if probe.is_full_range and probe.pixel_format.startswith("yuv") and not probe.pixel_format.startswith("yuvj"):
            return "its colours use the full range, which torchcodec takes for limited"
        if not probe.is_turned_only:
            return "is to be shown mirrored or slanted, torchcodec only turns"
        if self._codecs is not None and probe.codec.replace("libdav1d", "av1") not in self._codecs:
            return f"its codec is {probe.codec}, wanted one of {', '.join(self._codecs)}"
        if self._codecs is not None and probe.pixel_format not in GPU_FORMATS:
            return f"its pixel format is {probe.pixel_format}, wanted {' or '.join(GPU_FORMATS)}"
        return None

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`. Raises SampleError also when torchcodec sees other frames than are shown."""
        for rgb_HW3 in self._frames(probe, frame_indices):
            yield rgb_HW3.cpu().numpy()

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        """[F, height_px, width_px, 3] uint8 on the CPU, resized where they were decoded. Raises SampleError."""
        frames = self._frames(probe, frame_indices)
        return torch.stack([resize_frame(rgb_HW3, height_px, width_px).cpu() for rgb_HW3 in frames])

    def _frames(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """[H, W, 3] uint8 on the device that decodes, one per index."""
        require_video_file(probe.path)
        indices = [int(index) for index in frame_indices]
        try:
            decoder = self._open(probe)
            for start in range(0, len(indices), NUM_FRAMES_AT_ONCE):
                some = indices[start : start + NUM_FRAMES_AT_ONCE]
                batch = decoder.get_frames_at(some)
                _require_times(probe, some, batch.pts_seconds.numpy() - decoder.metadata.begin_stream_seconds)
                rgb_FHW3 = batch.data
                if tuple(rgb_FHW3.shape[1:]) != (probe.height_px, probe.width_px, 3):
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
            device=self._device,
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


def cuda_failure(codec: str) -> str | None:
    """What went wrong when torchcodec decoded a clip of `codec` on the current GPU; None: nothing did. Never raises."""
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    try:
        encoded, wanted_FHW3 = proof_clip(codec)
        decoder: Any = VideoDecoder(encoded.tobytes(), dimension_order="NHWC", device="cuda", seek_mode="exact")
        wrong = difference(decoder.get_frames_in_range(0, len(decoder)).data, wanted_FHW3)
        wrong = wrong or difference(decoder.get_frames_at([len(decoder) - 1]).data, wanted_FHW3[-1:], "after a seek, ")
        return wrong or (f"the CPU decodes it ({decoder.cpu_fallback})" if decoder.cpu_fallback else None)
    except Exception as error:  # a build without CUDA, a driver without NVDEC
        return " ".join(str(error).split())[:200] or type(error).__name__


def _require_times(probe: Probe, indices: list[int], got_s: np.ndarray) -> None:
    wanted_s = probe.times_s[indices]
    wrong = np.flatnonzero(np.abs(got_s - wanted_s) > MAX_TIME_ERROR_S)
    if wrong.size:
        raise UnsuitedError(
            probe.path,
            f"torchcodec gives the frame of {got_s[wrong[0]]:.3f} s where that of {wanted_s[wrong[0]]:.3f} s is "
            "wanted; set video.reader to pyav",
        )
