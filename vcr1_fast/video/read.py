"""The one way from a video file to `Frames`: probe, choose frames, choose a size, decode only these, resize."""

from __future__ import annotations

import numpy as np
import torch

from vcr1_fast.config import VideoConfig
from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video.reader import Reader
from vcr1_fast.video.resolution import frame_size_px, resize_frame
from vcr1_fast.video.sampling import choose_frames


def open_reader(config: VideoConfig) -> Reader:
    """The reader that `config.reader` names; auto is PyAV. Its `name` belongs in the head of the run's output.

    Raises ModuleNotFoundError when decord is asked for and not installed.
    """
    if config.reader == "decord":
        from vcr1_fast.video.decord_reader import DecordReader

        return DecordReader(config.timeout_s)
    from vcr1_fast.video.pyav_reader import PyavReader

    return PyavReader()


def read_frames(path: str, config: VideoConfig, reader: Reader) -> Frames:
    """Decode `path` as `config` asks: frames [F, H, W, 3] uint8, F even, H and W multiples of 28.

    times_s counts from the first shown frame. Raises SampleError when the file cannot be used as it is.
    """
    probe = reader.probe(path)
    try:
        choice = choose_frames(probe.times_s, probe.duration_s, config)
        num_frames = len(choice.indices)
        height_px, width_px = frame_size_px(probe.height_px, probe.width_px, num_frames, config)
    except ValueError as error:
        raise SampleError(path, str(error)) from error
    rgb_FHW3 = torch.empty(num_frames, height_px, width_px, 3, dtype=torch.uint8)
    num_read = 0
    for i, rgb_HW3 in enumerate(reader.read(probe, choice.indices)):
        rgb_FHW3[i] = resize_frame(torch.from_numpy(rgb_HW3), height_px, width_px)
        num_read = i + 1
    if num_read != num_frames:
        raise SampleError(path, f"{reader.name} gave {num_read} frames, wanted {num_frames}; the file is damaged")
    times_s = torch.from_numpy(probe.times_s[np.array(choice.indices)])
    return Frames(rgb_FHW3, times_s, choice.sampled_fps, probe.duration_s, reader.name)
