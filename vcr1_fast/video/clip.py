"""What to read of which source: a whole video, the part of it between two times, a fixed number of its images, where
more of it shall be seen; or one image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vcr1_fast.settings.config import ConfigError, VideoConfig
from vcr1_fast.types import Frames, Interval, SampleError
from vcr1_fast.video.formats import QWEN2_5_VL
from vcr1_fast.video.read import read_frames, read_image, read_resized
from vcr1_fast.video.reader import Probe, Reader
from vcr1_fast.video.resolution import largest_clip_bytes
from vcr1_fast.video.source_name import FRAGMENT, SourceName, part_name

__all__ = ["FRAGMENT", "ClipRequest", "ImagesReader", "PartReader", "part_name", "read_clip"]


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip as the model shall see it. Equal requests give equal frames."""

    path: str  # absolute; a video file or a folder of images
    config: VideoConfig  # sampling and size
    start_s: float = 0.0
    end_s: float = math.inf
    num_images: int | None = None  # that many equally spaced images stand for the whole, config.fps of them a second
    evidence_s: tuple[Interval, ...] = ()  # where frames lie closer together, in seconds of the part
    folder_fps: float | None = None  # rate of a folder of images whose name says it; also config.image_folder_fps
    factor_px: int = QWEN2_5_VL.factor_px  # height and width of a frame are multiples of it
    is_image: bool = False  # the path is that of an image file; nothing above but its size counts

    @staticmethod
    def of(video: str, config: VideoConfig, factor_px: int = QWEN2_5_VL.factor_px) -> ClipRequest:
        """The request that a name in `Example.sources` stands for, see `source_name`.

        A fixed number of images is seen whole and at its declared rate, whatever `config` says of rate and length.
        Raises SampleError for a rate that cannot be.
        """
        name = SourceName.parse(video)
        if name.is_image:
            return ClipRequest(name.path, config, factor_px=factor_px, is_image=True)
        try:
            if name.part_fps is not None:
                config = replace(config, fps=name.part_fps)
            if name.num_images is not None and name.images_fps is not None:
                num_frames = name.num_images + name.num_images % 2
                config = replace(config, fps=name.images_fps, min_frames=num_frames, max_frames=num_frames)
            elif name.images_fps is not None:
                config = replace(config, image_folder_fps=name.images_fps)
        except ConfigError as error:
            raise SampleError(video, f"its name asks for what cannot be: {error}") from error
        declared_fps = None if name.num_images is not None else name.images_fps
        part = (name.start_s, name.end_s, name.num_images)
        more = {"evidence_s": name.evidence_s, "folder_fps": declared_fps, "factor_px": factor_px}
        return ClipRequest(name.path, config, *part, **more)

    @property
    def is_whole(self) -> bool:
        return self.start_s == 0.0 and self.end_s == math.inf

    @property
    def max_bytes(self) -> int:
        """Upper bound of its pixels."""
        return 3 * self.config.max_image_pixels if self.is_image else largest_clip_bytes(self.config)


def read_clip(request: ClipRequest, reader: Reader) -> Frames:
    """Decode what is asked for, see `read_frames` and `read_image`. Raises SampleError."""
    if request.is_image:
        return read_image(request.path, request.config, request.factor_px)
    if request.num_images is not None:
        reader = ImagesReader(reader, request.num_images, request.config.fps)
    elif request.folder_fps is not None:
        reader = FolderReader(reader, request.folder_fps)
    if not request.is_whole:
        reader = PartReader(reader, request.start_s, request.end_s)
    return read_frames(request.path, request.config, reader, request.evidence_s, request.factor_px)


class PartReader:
    """A Reader that shows only the frames of [start_s, end_s), as a video of its own."""

    def __init__(self, reader: Reader, start_s: float, end_s: float) -> None:
        self.reader, self.start_s, self.end_s = reader, start_s, end_s
        self.name = reader.name
        self._whole: dict[str, tuple[Probe, int]] = {}  # path -> probe and the first frame of the part

    def probe(self, path: str) -> Probe:
        """Raises SampleError also when no frame lies in the part."""
        whole = self.reader.probe(path)
        first, last = np.searchsorted(whole.times_s, [self.start_s, self.end_s], side="left")
        if last - first < 1:
            raise SampleError(path, f"no frame lies between {self.start_s:g} and {self.end_s:g} s")
        self._whole[path] = (whole, int(first))
        times_s = whole.times_s[first:last] - whole.times_s[first]
        ticks = None if whole.ticks is None else whole.ticks[first:last]
        duration_s = min(self.end_s, whole.duration_s) - float(whole.times_s[first])
        return replace(whole, times_s=times_s, ticks=ticks, duration_s=duration_s)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        whole, first = self._whole[probe.path]
        return self.reader.read(whole, [index + first for index in frame_indices])

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        whole, first = self._whole[probe.path]
        return read_resized(self.reader, whole, [index + first for index in frame_indices], height_px, width_px)

    def close(self) -> None:
        """The reader inside is closed by who opened it."""


class FolderReader:
    """A Reader that takes a folder of images for a video of `fps`. A file has a rate of its own and keeps it."""

    def __init__(self, reader: Reader, fps: float) -> None:
        self.reader, self.fps = reader, fps
        self.name = reader.name

    def probe(self, path: str) -> Probe:
        whole = self.reader.probe(path)
        if not whole.images:
            return whole
        num_images = len(whole.images)
        return replace(whole, times_s=np.arange(num_images) / self.fps, duration_s=num_images / self.fps)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        return self.reader.read(probe, frame_indices)

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        return read_resized(self.reader, probe, frame_indices, height_px, width_px)

    def close(self) -> None:
        """The reader inside is closed by who opened it."""


class ImagesReader:
    """A Reader that shows `num_images` frames of a source, `fps` a second, as a video of its own.

    Frame i of n is frame floor(i * (N - 1) / (n - 1)) of the N there are: the first, the last, and the others at equal
    distances between, as VideoChat-R1 takes 7 images of a GOT-10k folder. An odd number is made even with the last
    frame once more, because the vision tower takes frames in pairs.
    """

    def __init__(self, reader: Reader, num_images: int, fps: float) -> None:
        self.reader, self.num_images, self.fps = reader, num_images, fps
        self.name = reader.name
        self._whole: dict[str, Probe] = {}

    def probe(self, path: str) -> Probe:
        whole = self.reader.probe(path)
        self._whole[path] = whole
        times_s = np.arange(self.num_images + self.num_images % 2) / self.fps
        return replace(whole, times_s=times_s, ticks=None, duration_s=len(times_s) / self.fps)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        whole = self._whole[probe.path]
        return self.reader.read(whole, self._shown(whole, frame_indices))

    def read_frames(self, probe: Probe, frame_indices: Sequence[int], height_px: int, width_px: int) -> torch.Tensor:
        whole = self._whole[probe.path]
        return read_resized(self.reader, whole, self._shown(whole, frame_indices), height_px, width_px)

    def _shown(self, whole: Probe, frame_indices: Sequence[int]) -> list[int]:
        last, num_gaps = len(whole.times_s) - 1, max(1, self.num_images - 1)
        return [min(index, self.num_images - 1) * last // num_gaps for index in frame_indices]

    def close(self) -> None:
        """The reader inside is closed by who opened it."""
