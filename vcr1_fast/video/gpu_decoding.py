"""Which readers decode on a GPU, and what that takes of its memory: for the plan of a run, before any is opened."""

from __future__ import annotations

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.resolution import largest_clip_bytes

GPU_READERS = ("dali", "torchcodec_cuda")  # dali where there is a GPU
MAX_DECODED_BYTES = 1 << 28  # full-size frames on the device at once, per pipeline; 43 frames of 1080p
CONTEXT_BYTES = 1_000_000_000  # of a process with torch and a decoder's libraries; estimated, as is the formula below


def may_decode_on_gpu(config: VideoConfig) -> bool:
    """Whether a run on GPUs may have such a reader: auto is decided later."""
    return config.reader == "auto" or config.reader.startswith(GPU_READERS)


def decoding_bytes(config: VideoConfig) -> int:
    """Of a rank's GPU, at worst: frames as they are decoded, resized in one direction in float32, and resized."""
    if not may_decode_on_gpu(config):
        return 0
    resized = largest_clip_bytes(config)
    return CONTEXT_BYTES + MAX_DECODED_BYTES + 4 * max(MAX_DECODED_BYTES, resized) + resized
