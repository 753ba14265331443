"""The one way from a video file, a folder of images or one image to `Frames`.

Probe, choose frames, choose a size, decode only these, resize.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, Interval, SampleError
from vcr1_fast.video.formats import QWEN2_5_VL
from vcr1_fast.video.gpu_decoding import GPU_READERS
from vcr1_fast.video.image_folder_reader import ImageFolderReader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, Reader, UnsuitedError
from vcr1_fast.video.resolution import fitting_size_px, frame_size_px, resize_frame
from vcr1_fast.video.sampling import choose_frames


def open_reader(config: VideoConfig) -> Reader:
    """The reader that `config.reader` names, for files and folders. Its `name` belongs in the head of the run's output.

    auto: PyAV; a run has put its choice in the place of that before, see `reader_choice`.
    Raises ModuleNotFoundError when the reader is not installed, RuntimeError when it does not work on this machine.
    """
    name, _, others = config.reader.partition("+")
    folders = ImageFolderReader(config.image_folder_fps, config.max_source_pixels)
    return SourceReader(
        _open_file_reader(name, config), folders, PyavReader(config.max_source_pixels) if others else None
    )


def gpu_index(config: VideoConfig) -> int | None:
    """The GPU that `open_reader` decodes on, the current one; None: it does not. Such a reader gets its own process."""
    is_on_gpu = config.reader.startswith(GPU_READERS) and torch.cuda.is_available()
    return torch.cuda.current_device() if is_on_gpu else None


def num_processes(config: VideoConfig) -> int:
    """Processes that read for a rank; 0: threads of its own do. One on a GPU, where each costs `decoding_bytes`; one at
    least for decord, which may have to be killed.
    """
    if gpu_index(config) is not None:
        return 1
    return max(config.num_workers, 1) if config.reader == "decord" else config.num_workers


def _open_file_reader(name: str, config: VideoConfig) -> Reader:
    """Imports only what is used: torchcodec takes 1 s, DALI several."""
    if name == "dali":
        from vcr1_fast.video.dali_reader import DaliReader

        return DaliReader(config, "cpu" if gpu_index(config) is None else "gpu")
    if name == "decord":
        from vcr1_fast.video.decord_reader import DecordReader

        return DecordReader(config.max_source_pixels)
    if name in ("torchcodec", "torchcodec_cuda"):
        from vcr1_fast.video.torchcodec_reader import TorchcodecReader

        return TorchcodecReader(config.max_source_pixels, "cuda" if name == "torchcodec_cuda" else "cpu")
    return PyavReader(config.max_source_pixels)


class SourceReader:
    """Reads a file with one reader and a folder of images with another. With `others`, files that `files` is not right
    for are read with that: a clip always with the same one."""

    def __init__(self, files: Reader, folders: Reader, others: PyavReader | None = None) -> None:
        self.files, self.folders, self.others = files, folders, others
        self.name = f"{files.name}, others {others.name}" if others else files.name
        if self.name != folders.name:
            self.name += f", images {folders.name}"

    def probe(self, path: str) -> Probe:
        if os.path.isdir(path):
            return self.folders.probe(path)
        try:
            return self.files.probe(path)
        except UnsuitedError as error:
            if self.others is None:
                raise
            return replace(error.probe or self.others.probe(path), decoded_by=self.others.name)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        return self._reader(probe).read(probe, frame_indices)

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        try:
            return read_resized(self._reader(probe), probe, frame_indices, height_px, width_px)
        except UnsuitedError:  # torchcodec, which finds out when it decodes
            if self.others is None:
                raise
            return read_resized(self.others, probe, frame_indices, height_px, width_px)

    def close(self) -> None:
        self.files.close()  # the others hold nothing

    def _reader(self, probe: Probe) -> Reader:
        if probe.images:
            return self.folders
        return self.others if self.others and probe.decoded_by == self.others.name else self.files


@dataclass(frozen=True, slots=True)
class Timeline:
    """N frames that stand for a source, or for a part of it, as a video of their own."""

    indices_N: np.ndarray  # int64, ascending, among all frames
    times_s: np.ndarray  # [N] float64, from 0
    duration_s: float


def _whole(probe: Probe) -> Timeline:
    return Timeline(np.arange(len(probe.times_s)), probe.times_s, probe.duration_s)


def read_frames(
    path: str,
    config: VideoConfig,
    reader: Reader,
    evidence_s: Sequence[Interval] = (),
    factor_px: int = QWEN2_5_VL.factor_px,
    timeline: Callable[[Probe], Timeline] = _whole,
) -> Frames:
    """Decode `path` as `config` asks: frames [F, H, W, 3] uint8, F even, H and W multiples of factor_px.

    `evidence_s`: seconds in which frames lie closer together, see `choose_frames`. times_s counts from the first shown
    frame. `timeline` says what there is to show, and raises ValueError where that is nothing. Raises SampleError when
    the file cannot be used as it is.
    """
    probe = reader.probe(path)
    try:
        shown = timeline(probe)
        choice = choose_frames(shown.times_s, shown.duration_s, config, evidence_s)
        num_frames = len(choice.indices)
        height_px, width_px = frame_size_px(probe.height_px, probe.width_px, num_frames, config, factor_px)
    except ValueError as error:
        raise SampleError(path, str(error)) from error
    chosen = np.array(choice.indices)
    rgb_FHW3 = read_resized(reader, probe, shown.indices_N[chosen].tolist(), height_px, width_px)
    return Frames(rgb_FHW3, torch.from_numpy(shown.times_s[chosen]), choice.sampled_fps, shown.duration_s, reader.name)


def read_image(path: str, config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px) -> Frames:
    """An image file as one frame [1, H, W, 3] without time, at the size that `config` asks for images. Raises
    SampleError when the file cannot be used as it is."""
    reader = ImageFolderReader(config.image_folder_fps, config.max_source_pixels)
    rgb_HW3 = reader.read_image(path)
    try:
        bounds = config.min_image_pixels, Fraction(config.max_image_pixels)
        size_px = fitting_size_px(rgb_HW3.shape[0], rgb_HW3.shape[1], *bounds, factor_px)
    except ValueError as error:
        raise SampleError(path, str(error)) from error
    rgb_1HW3 = resize_frame(torch.from_numpy(rgb_HW3), *size_px)[None]
    return Frames(rgb_1HW3, torch.zeros(1, dtype=torch.float64), 1.0, 0.0, reader.name)


def read_resized(
    reader: Reader, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int
) -> torch.Tensor:
    """[F, height_px, width_px, 3] uint8, one frame per index, on the CPU.

    A reader with a `read_frames` of its own, like DALI's, resizes where it decodes. Raises SampleError; ValueError from
    a reader that gives too few frames, so that no memory is left as it was found.
    """
    read_frames = getattr(reader, "read_frames", None)
    if read_frames is not None:
        return read_frames(probe, frame_indices, height_px, width_px)
    rgb_FHW3 = torch.empty(len(frame_indices), height_px, width_px, 3, dtype=torch.uint8)
    for out_HW3, rgb_HW3 in zip(rgb_FHW3, reader.read(probe, frame_indices), strict=True):
        out_HW3[:] = resize_frame(torch.from_numpy(rgb_HW3), height_px, width_px)
    return rgb_FHW3
