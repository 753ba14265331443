"""What DALI can decode on this machine, found out by letting it decode: asked once, when a run starts.

A codec counts only after DALI gave every frame of a small clip of it, in order and with the right picture. Lists of
supported codecs do not say whether frames come in the right order (B-frames, hidden frames) or at all.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import io
from dataclasses import dataclass

import av
import numpy as np
import torch

from vcr1_fast.video.bitstream import BitstreamCheck
from vcr1_fast.video.dali_cut import PacketTable, copy_of
from vcr1_fast.video.dali_pipeline import Device, Job, Pipeline
from vcr1_fast.video.proof_clip import PROOF_FPS, difference, proof_clip

DISTRIBUTIONS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")

CODECS: dict[Device, tuple[str, ...]] = {
    "cpu": ("vp8", "vp9", "mjpeg"),
    "gpu": ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4"),
}
NUM_CUT_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Picture sizes that NVDEC takes, in pixels."""

    min_width_px: int
    min_height_px: int
    max_width_px: int
    max_height_px: int
    max_macroblocks: int  # width * height / 256

    def allow(self, width_px: int, height_px: int) -> bool:
        return (
            self.min_width_px <= width_px <= self.max_width_px
            and self.min_height_px <= height_px <= self.max_height_px
            and width_px * height_px // 256 <= self.max_macroblocks
        )


# NVIDIA's Video Codec SDK 13 for Turing and later, 8-bit 4:2:0. What is larger is refused on newer GPUs, too.
LIMITS = {
    "h264": Limits(48, 16, 4096, 4096, 65536),
    "hevc": Limits(144, 144, 8192, 8192, 262144),
    "vp8": Limits(48, 16, 4096, 4096, 65536),
    "vp9": Limits(128, 128, 8192, 8192, 262144),
    "av1": Limits(128, 128, 8192, 8192, 262144),
    "mpeg4": Limits(48, 16, 2032, 2032, 8192),
}


def version() -> str | None:
    """Version of the DALI that is installed, or None."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def unavailable_reason(device: Device) -> str | None:
    """Why DALI cannot decode on `device` here, in one clause; None: it can. Never raises; decodes a small clip."""
    try:
        if version() is None:
            return "DALI is not installed (pip install nvidia-dali-cuda130)"
        if device == "gpu":
            if not torch.cuda.is_available():
                return "there is no CUDA device"
            try:
                ctypes.CDLL("libnvcuvid.so.1")
            except OSError:
                return "libnvcuvid.so.1 is missing (a container needs NVIDIA_DRIVER_CAPABILITIES=video)"
        first = CODECS[device][0]
        failure = proof_failure(first, device)
        return None if failure is None else f"DALI does not decode {first} here: {failure}"
    except Exception as error:  # a broken installation may raise anything
        return f"DALI does not work here: {type(error).__name__}: {str(error)[:200]}"


@functools.cache
def proven_codecs(device: Device) -> tuple[str, ...]:
    """The codecs whose test clip DALI decoded right on `device`, in a fixed order; takes about 1 s, once."""
    return tuple(codec for codec in CODECS[device] if proof_failure(codec, device) is None)


@functools.cache
def proof_failure(codec: str, device: Device) -> str | None:
    """What went wrong when DALI decoded a clip of `codec`, against FFmpeg's frames; None: nothing did."""
    try:
        encoded, wanted_FHW3 = proof_clip(codec)
        pipeline, num_frames = Pipeline(device, is_resized=False), len(wanted_FHW3)
        part = _last_frames(codec, encoded)
        got = pipeline.decode(Job(encoded, np.arange(num_frames, dtype=np.int32), None))
        got_of_part = pipeline.decode(part)
    except Exception as error:  # no encoder, no decoder, no NVDEC
        return str(error)[:200] or type(error).__name__
    wanted_of_part = wanted_FHW3[num_frames - len(part.indices_F) :]
    return difference(got, wanted_FHW3) or difference(got_of_part, wanted_of_part, "of a part that was cut out, ")


def _last_frames(codec: str, encoded: np.ndarray) -> Job:
    """The last NUM_CUT_FRAMES of a proof clip, from a keyframe in the middle of it."""
    with av.open(io.BytesIO(encoded.tobytes()), "r") as container:
        stream = container.streams.video[0]
        table = PacketTable(codec, BitstreamCheck(codec, stream.codec_context.extradata))
        ticks: list[int] = []
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                table.add(packet)
                ticks.append(packet.pts)
        entries = table.entries(np.arange(len(ticks)) / PROOF_FPS)
        cut = entries and entries.cut(np.sort(ticks)[-NUM_CUT_FRAMES:])
        if cut is None:
            raise ValueError("its proof clip has no second keyframe")
        return Job(copy_of(cut, container, stream), cut.indices_F, None)
