"""What to read of which source: a whole video, the part of it between two times, a fixed number of its images, where
more of it shall be seen; or one image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vcr1_fast.settings.config import ConfigError, VideoConfig
from vcr1_fast.types import Frames, Interval, SampleError
from vcr1_fast.video.formats import QWEN2_5_VL
from vcr1_fast.video.read import Timeline, read_frames, read_image
from vcr1_fast.video.reader import Probe, Reader
from vcr1_fast.video.resolution import largest_clip_bytes
from vcr1_fast.video.source_name import SourceName


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip as the model shall see it. Equal requests give equal frames."""

    path: str  # absolute; a video file or a folder of images
    config: VideoConfig  # sampling and size
    start_s: float = 0.0
    end_s: float = math.inf
    num_images: int | None = None  # that many equally spaced images stand for the whole, config.fps of them a second
    evidence_s: tuple[Interval, ...] = ()  # where frames lie closer together, in seconds of the part
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
        return ClipRequest(
            name.path, config, name.start_s, name.end_s, name.num_images, name.evidence_s, factor_px=factor_px
        )

    @property
    def max_bytes(self) -> int:
        """Upper bound of its pixels."""
        return 3 * self.config.max_image_pixels if self.is_image else largest_clip_bytes(self.config)

    def timeline(self, probe: Probe) -> Timeline:
        """What is seen of a source. Raises ValueError when none of its frames lies in the part.

        Image i of n is frame floor(i * (N - 1) / (n - 1)) of the N there are: the first, the last, and the others at
        equal distances between, as VideoChat-R1 takes 7 images of a GOT-10k folder. An odd number is made even with the
        last one once more, because the vision tower takes frames in pairs. A file has a rate of its own and keeps it.
        """
        frames, fps = np.arange(len(probe.times_s)), self.config.image_folder_fps
        if self.num_images is not None:
            places, fps = np.arange(self.num_images + self.num_images % 2), self.config.fps
            frames = np.minimum(places, self.num_images - 1) * frames[-1] // max(1, self.num_images - 1)
        is_listed = self.num_images is not None or bool(probe.images)
        times_s = np.arange(len(frames)) / fps if is_listed else probe.times_s
        duration_s = len(frames) / fps if is_listed else probe.duration_s
        first, end = np.searchsorted(times_s, [self.start_s, self.end_s])
        if first >= end:
            raise ValueError(f"no frame lies between {self.start_s:g} and {self.end_s:g} s")
        start_s = times_s[first]
        return Timeline(frames[first:end], times_s[first:end] - start_s, min(self.end_s, duration_s) - float(start_s))


def read_clip(request: ClipRequest, reader: Reader) -> Frames:
    """Decode what is asked for, see `read_frames` and `read_image`. Raises SampleError."""
    if request.is_image:
        return read_image(request.path, request.config, request.factor_px)
    more = (request.evidence_s, request.factor_px, request.timeline)
    return read_frames(request.path, request.config, reader, *more)
