"""The one way from a video file or folder of images to `Frames`.

Probe, choose frames, choose a size, decode only these, resize.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, Interval, SampleError
from vcr1_fast.video.formats import QWEN2_5_VL
from vcr1_fast.video.image_folder_reader import ImageFolderReader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, Reader
from vcr1_fast.video.resolution import frame_size_px, resize_frame
from vcr1_fast.video.sampling import choose_frames


def open_reader(config: VideoConfig) -> Reader:
    """The reader that `config.reader` names, for files and folders. Its `name` belongs in the head of the run's output.

    auto: DALI on a GPU where it works, for the files it takes, PyAV for the others; PyAV without a GPU.
    Raises ModuleNotFoundError when the reader is not installed, RuntimeError when it does not work on this machine.
    """
    return SourceReader(_open_file_reader(config), ImageFolderReader(config.image_folder_fps, config.max_source_pixels))


def decodes_on_gpu(config: VideoConfig) -> bool:
    """Whether `open_reader` decodes on a GPU. Such a reader belongs into the process that uses the frames."""
    if config.reader not in ("auto", "dali") or not torch.cuda.is_available():
        return False
    from vcr1_fast.video import dali_reader

    return config.reader == "dali" or dali_reader.unavailable_reason("gpu") is None


def _open_file_reader(config: VideoConfig) -> Reader:
    """Imports only what is used: torchcodec takes 1 s, DALI several."""
    if config.reader == "dali" or decodes_on_gpu(config):
        from vcr1_fast.video.dali_reader import DaliReader

        dali = DaliReader(config, "gpu" if decodes_on_gpu(config) else "cpu")
        return dali if config.reader == "dali" else EitherReader(dali, PyavReader(config.max_source_pixels))
    if config.reader == "decord":
        from vcr1_fast.video.decord_reader import DecordReader

        return DecordReader(
            config.timeout_s, max_source_pixels=config.max_source_pixels, clips_per_worker=config.clips_per_worker
        )
    if config.reader == "torchcodec":
        from vcr1_fast.video.torchcodec_reader import TorchcodecReader

        return TorchcodecReader(config.max_source_pixels)
    return PyavReader(config.max_source_pixels)


class SourceReader:
    """Reads a file with one reader and a folder of images with another."""

    def __init__(self, files: Reader, folders: Reader) -> None:
        self.files, self.folders = files, folders
        self.name = files.name if files.name == folders.name else f"{files.name}, images {folders.name}"

    def probe(self, path: str) -> Probe:
        return (self.folders if os.path.isdir(path) else self.files).probe(path)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        return (self.folders if probe.images else self.files).read(probe, frame_indices)

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        reader = self.folders if probe.images else self.files
        return read_resized(reader, probe, frame_indices, height_px, width_px)

    def close(self) -> None:
        self.files.close()
        self.folders.close()


class ChoosyReader(Reader, Protocol):
    """A Reader that knows which files it is right for."""

    def takes(self, path: str) -> bool:
        """Depends on the file and on nothing that changes during a run. Raises SampleError."""
        ...


class EitherReader:
    """Reads the files that `first` takes with it and all others with `second`: for a file always the same one."""

    def __init__(self, first: ChoosyReader, second: Reader) -> None:
        self.first, self.second = first, second
        self.name = f"{first.name}, others {second.name}"

    def probe(self, path: str) -> Probe:
        reader = self.first if self.first.takes(path) else self.second
        return replace(reader.probe(path), decoded_by=reader.name)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        return self._reader(probe).read(probe, frame_indices)

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        return read_resized(self._reader(probe), probe, frame_indices, height_px, width_px)

    def close(self) -> None:
        self.first.close()
        self.second.close()

    def _reader(self, probe: Probe) -> Reader:
        return self.first if probe.decoded_by == self.first.name else self.second


def read_frames(
    path: str,
    config: VideoConfig,
    reader: Reader,
    evidence_s: Sequence[Interval] = (),
    factor_px: int = QWEN2_5_VL.factor_px,
) -> Frames:
    """Decode `path` as `config` asks: frames [F, H, W, 3] uint8, F even, H and W multiples of factor_px.

    `evidence_s`: seconds in which frames lie closer together, see `choose_frames`. times_s counts from the first shown
    frame. Raises SampleError when the file cannot be used as it is.
    """
    probe = reader.probe(path)
    try:
        choice = choose_frames(probe.times_s, probe.duration_s, config, evidence_s)
        num_frames = len(choice.indices)
        height_px, width_px = frame_size_px(probe.height_px, probe.width_px, num_frames, config, factor_px)
    except ValueError as error:
        raise SampleError(path, str(error)) from error
    rgb_FHW3 = read_resized(reader, probe, choice.indices, height_px, width_px)
    times_s = torch.from_numpy(probe.times_s[np.array(choice.indices)])
    return Frames(rgb_FHW3, times_s, choice.sampled_fps, probe.duration_s, reader.name)


def read_resized(
    reader: Reader, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int
) -> torch.Tensor:
    """[F, height_px, width_px, 3] uint8, one frame per index, on the device on which the reader works.

    A reader with a `read_frames` of its own, like DALI's, resizes where it decodes. Raises SampleError.
    """
    read_frames = getattr(reader, "read_frames", None)
    if read_frames is not None:
        return read_frames(probe, frame_indices, height_px, width_px)
    rgb_FHW3 = torch.empty(len(frame_indices), height_px, width_px, 3, dtype=torch.uint8)
    num_read = 0
    for i, rgb_HW3 in enumerate(reader.read(probe, frame_indices)):
        rgb_FHW3[i] = resize_frame(torch.from_numpy(rgb_HW3), height_px, width_px)
        num_read = i + 1
    if num_read != len(frame_indices):
        raise SampleError(
            probe.path, f"{reader.name} gave {num_read} frames, wanted {len(frame_indices)}; the file is damaged"
        )
    return rgb_FHW3
