"""A folder of images (GOT-10k: 00000001.jpg, 00000002.jpg ...) as a video of constant rate."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.image_header import SUFFIXES, ImageHeader, read_image_header
from vcr1_fast.video.reader import Probe, decoder_limit, require_pixels, upright

MAX_BYTES_PER_PIXEL = 8  # four 16-bit channels that do not compress at all

# Of a JPEG without its last bytes FFmpeg makes a picture even when told to explode. A thumbnail has both before these.
START_OF_SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"

NameParts = list[str | int]


class ImageFolderReader:
    """Images in the order of the numbers in their names, decoded with PyAV. Stateless; other files are ignored."""

    name = f"pyav {av.__version__}"

    def __init__(self, image_folder_fps: float, max_source_pixels: int = VideoConfig.max_source_pixels) -> None:
        self.image_folder_fps, self.max_source_pixels = image_folder_fps, max_source_pixels

    def probe(self, path: str) -> Probe:
        """Raises SampleError when there is no image, one is missing in the count, or the first cannot be used."""
        names = image_names(path)
        header = self._header(path, names[0], self._load(path, names[0]))
        width_px, height_px = header.width_px, header.height_px
        if header.is_transposed:
            width_px, height_px = height_px, width_px
        times_s = np.arange(len(names)) / self.image_folder_fps
        duration_s = len(names) / self.image_folder_fps
        return Probe(path, times_s, width_px, height_px, duration_s, images=names)

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`. Every image must have the displayed size of the first."""
        last_index, rgb_HW3 = -1, np.empty(0, dtype=np.uint8)
        for index in frame_indices:
            if index != last_index:
                rgb_HW3, last_index = self._of_size(probe, probe.images[index]), index
            yield rgb_HW3

    def read_image(self, path: str) -> np.ndarray:
        """[H, W, 3] uint8 of one image file, upright. Raises SampleError."""
        try:
            return self._decode(*os.path.split(path))
        except SampleError as error:
            raise SampleError(path, error.reason) from error

    def close(self) -> None:
        """Nothing is held between calls."""

    def _load(self, folder: str, name: str) -> bytes:
        path = Path(folder, name)
        max_bytes = MAX_BYTES_PER_PIXEL * self.max_source_pixels + (1 << 20)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise SampleError(folder, f"{name} is not a regular file, wanted an image")
            if status.st_size > max_bytes:
                raise SampleError(
                    folder, f"{name} has {status.st_size:,} bytes, more than the {max_bytes:,} an image may need"
                )
            return path.read_bytes()
        except OSError as error:
            raise SampleError(folder, f"{name} cannot be opened: {error.strerror}") from error

    def _header(self, folder: str, name: str, data: bytes) -> ImageHeader:
        if not data:
            raise SampleError(folder, f"{name} is empty (0 bytes); fetch it again")
        try:
            header = read_image_header(data)
        except ValueError as error:
            raise SampleError(folder, f"{name} is not an image that can be read: {error}") from error
        require_pixels(folder, header.width_px, header.height_px, self.max_source_pixels, what=name)
        return header

    def _decode(self, folder: str, name: str) -> np.ndarray:
        data = self._load(folder, name)
        header = self._header(folder, name, data)
        if header.codec == "mjpeg" and data.rfind(END_OF_JPEG) < data.rfind(START_OF_SCAN):
            raise SampleError(folder, f"{name} cannot be decoded, it is cut short; fetch it again")
        try:
            context = av.CodecContext.create(header.codec, "r")
            assert isinstance(context, VideoCodecContext)
            context.thread_count = 1
            # Without explode a damaged JPEG is a picture with a grey part, and no error.
            context.options = {**decoder_limit(self.max_source_pixels), "err_detect": "crccheck+bitstream+explode"}
            frames = [*context.decode(av.Packet(data)), *context.decode(None)]
            if len(frames) != 1 or frames[0].is_corrupt:
                raise ValueError(f"it holds {len(frames)} pictures" if len(frames) != 1 else "it is damaged")
            rgb = VideoReformatter().reformat(frames[0], format="rgb24", threads=1)  # its own choice: one per core
            return upright(rgb.to_ndarray(), *header.turn)
        except (FFmpegError, ValueError, RuntimeError, MemoryError) as error:
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SampleError(folder, f"{name} cannot be decoded, is it damaged? ({cause})") from error

    def _of_size(self, probe: Probe, name: str) -> np.ndarray:
        rgb_HW3 = self._decode(probe.path, name)
        height_px, width_px = rgb_HW3.shape[:2]
        if (width_px, height_px) != (probe.width_px, probe.height_px):
            raise SampleError(
                probe.path,
                f"{name} has {width_px} x {height_px} px, {probe.images[0]} has {probe.width_px} x "
                f"{probe.height_px}; wanted images of one size",
            )
        return rgb_HW3


def image_names(folder: str) -> tuple[str, ...]:
    """File names in `folder` that end like an image, in the order of the numbers in them.

    Raises SampleError when there are none, or when the numbers show that one is missing: the rate is then not constant.
    """
    try:
        with os.scandir(folder) as entries:
            # Dot files: macOS leaves ._00000001.jpg beside each image.
            names = [e.name for e in entries if _is_image_name(e.name) and not e.is_dir()]
    except (OSError, ValueError) as error:
        raise SampleError(folder, f"the folder cannot be opened: {error}") from error
    if not names:
        raise SampleError(folder, f"the folder holds no image ({', '.join(SUFFIXES)}); check data.video_root")
    ordered = sorted((_name_parts(os.path.splitext(name)[0]), name) for name in names)
    _require_steady_numbers(folder, ordered)
    return tuple(name for _, name in ordered)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _name_parts(stem: str) -> NameParts:
    """Text, number, text, number, ... text: sorts 10 after 9. Example: "a7" is ["a", 7, ""]."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", stem))]


def _require_steady_numbers(folder: str, ordered: list[tuple[NameParts, str]]) -> None:
    """Where names differ in one number only, it must rise by the same step from each image to the next."""
    first, *others = (parts for parts, _ in ordered)
    for parts, name in ordered[1:]:
        if len(parts) != len(first):
            reason = f"its images are named in different ways ({ordered[0][1]}, {name}), so their order is not clear"
            raise SampleError(folder, reason)
    varying = {i for parts in others for i in range(len(first)) if parts[i] != first[i]}
    if len(varying) != 1 or (column := varying.pop()) % 2 == 0:
        return
    numbers = [int(parts[column]) for parts, _ in ordered]
    steps = [after - before for before, after in pairwise(numbers)]
    step = min(step for step in steps if step) if any(steps) else 1
    for got, (_, before), (_, after) in zip(steps, ordered[:-1], ordered[1:], strict=True):
        if got == 0:
            raise SampleError(folder, f"an image is there twice ({before}, {after}); remove one of them")
        if got != step:
            raise SampleError(
                folder,
                f"an image is missing: {before} is followed by {after}, wanted numbers that rise by {step}; "
                "fetch the folder again",
            )
