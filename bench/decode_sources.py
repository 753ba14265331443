"""The clips that `python -m bench decode` reads: moving texture in H.264 or VP9, the same pictures every time.

A flat or a still clip would decode several times faster than what people film. Here a background of several octaves
pans by fractions of a pixel, textured discs cross it, and every frame has grain of its own: 0.4 to 5 Mbit/s from
320 x 240 to 1280 x 720, which is what the clips of video data sets have.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

VERSION = 1  # in the file names: raised when the pictures or the encoders' settings change
SOURCE_FPS = 25
GOP_FRAMES = 250  # x264's default: hardly any clip of the web lets a reader skip much
PAN_PX = 128  # how far the background moves back and forth
NUM_DISCS = 12
GRAIN_LEVELS = 4.0  # standard deviation
COLOR = 6  # SMPTE 170M (BT.601) for matrix, primaries and transfer: written down, so that no reader has to guess
X264 = {"preset": "veryfast", "crf": "22", "g": str(GOP_FRAMES), "sc_threshold": "0"}
VP9 = {
    "deadline": "realtime", "cpu-used": "8", "row-mt": "1", "tile-columns": "2", "crf": "33", "b": "0",
    "g": str(GOP_FRAMES), "keyint_min": str(GOP_FRAMES), "threads": "4",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One clip: what it is called follows from what is in it."""

    codec: str  # "h264" or "vp9"
    width_px: int
    height_px: int
    length_s: float

    @property
    def num_frames(self) -> int:
        return round(self.length_s * SOURCE_FPS)

    @property
    def file_name(self) -> str:
        ending = {"h264": "mp4", "vp9": "webm"}[self.codec]
        return f"{self.codec}_{self.width_px}x{self.height_px}_{self.length_s:g}s_v{VERSION}.{ending}"

    @property
    def encode_s(self) -> float:
        """About how long writing takes on two cores, from 25 to 40 Mpixel/s measured."""
        rate = {"h264": 2.5e7, "vp9": 3.5e7}[self.codec]
        return 1.0 + self.num_frames * self.width_px * self.height_px / rate


def write_source(source: Source, folder: Path) -> Path:
    """The clip in `folder`; it is encoded only when it is not there yet. Whole or absent, also when interrupted."""
    path = folder / source.file_name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{os.getpid()}_{path.name}")
    try:
        encode(source, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def encode(source: Source, path: Path) -> None:
    """Write `source` to `path`, whose ending names the container."""
    scene = Scene(source.width_px, source.height_px)
    name, options = ("libx264", X264) if source.codec == "h264" else ("libvpx-vp9", VP9)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(name, rate=SOURCE_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = source.width_px, source.height_px, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = COLOR
        context.color_range = 1  # 16 to 235
        context.time_base = Fraction(1, SOURCE_FPS)
        for index in range(source.num_frames):
            frame = av.VideoFrame.from_ndarray(scene.yuv420(index), format="yuv420p")
            frame.pts, frame.time_base = index, context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


class Scene:
    """Pictures of one size. Frame k depends on the size and k only."""

    def __init__(self, width_px: int, height_px: int) -> None:
        """Both sides even."""
        rng = np.random.default_rng((width_px, height_px))
        self.width_px, self.height_px = width_px, height_px
        self._luma = octaves(rng, height_px + PAN_PX + 1, width_px + PAN_PX + 1, 40, 210)
        self._chroma = [
            octaves(rng, (height_px + PAN_PX) // 2 + 1, (width_px + PAN_PX) // 2 + 1, 90, 166) for _ in "uv"
        ]
        self._grain = rng.normal(0.0, GRAIN_LEVELS, (height_px + PAN_PX, width_px + PAN_PX)).round().astype(np.int16)
        diameter = max(8, min(width_px, height_px) // 5) // 2 * 2
        rows, columns = np.ogrid[:diameter, :diameter]
        center = (diameter - 1) / 2
        self._is_disc = (rows - center) ** 2 + (columns - center) ** 2 <= center**2
        self._discs = [octaves(rng, diameter, diameter, 20, 235) for _ in range(NUM_DISCS)]
        self._orbits = rng.uniform((0.0, 0.2, 0.2), (2 * math.pi, 1.1, 1.1), (NUM_DISCS, 3))  # phase, speeds in rad/s
        self._grain_at = rng.integers(0, PAN_PX, (1024, 2))

    def yuv420(self, index: int) -> np.ndarray:
        """Frame `index` as [H * 3 / 2, W] uint8: Y above, U and V below it, as FFmpeg's yuv420p has them."""
        time_s = index / SOURCE_FPS
        top_px = PAN_PX / 2 * (1 + math.sin(0.31 * time_s))
        left_px = PAN_PX / 2 * (1 + math.sin(0.47 * time_s + 1.0))
        luma = shifted(self._luma, top_px, left_px, self.height_px, self.width_px).astype(np.int16)
        for (phase, speed_y, speed_x), disc in zip(self._orbits, self._discs, strict=True):
            diameter = len(disc)
            y = round((self.height_px - diameter) * (0.5 + 0.5 * math.sin(phase + speed_y * time_s)))
            x = round((self.width_px - diameter) * (0.5 + 0.5 * math.sin(2 * phase + speed_x * time_s)))
            np.copyto(luma[y : y + diameter, x : x + diameter], disc, where=self._is_disc, casting="unsafe")
        grain_y, grain_x = self._grain_at[index * 7 % 1024]
        luma += self._grain[grain_y : grain_y + self.height_px, grain_x : grain_x + self.width_px]
        height, width = self.height_px // 2, self.width_px // 2
        colors = [shifted(plane, top_px / 2, left_px / 2, height, width).ravel() for plane in self._chroma]
        planes = [luma.clip(16, 235).astype(np.uint8).ravel(), *colors]
        return np.concatenate(planes).reshape(self.height_px * 3 // 2, self.width_px)


def octaves(rng: np.random.Generator, height: int, width: int, lowest: float, highest: float) -> np.ndarray:
    """[height, width] uint8 between the two levels: noise of 5 octaves, amplitude falling with 1 / frequency^0.8."""
    total = np.zeros((height, width), np.float32)
    for octave in range(5):
        cell_px = 64 >> octave  # 64 to 4 pixels
        grid = rng.normal(size=(height // cell_px + 2, width // cell_px + 2)).astype(np.float32)
        total += stretched(grid, cell_px, height, width) * 2.0 ** (-0.8 * octave)
    low, high = np.percentile(total, (1, 99))
    return (lowest + (total - low) / (high - low) * (highest - lowest)).clip(lowest, highest).astype(np.uint8)


def stretched(grid: np.ndarray, cell_px: int, height: int, width: int) -> np.ndarray:
    """[height, width] float32 with one value of `grid` every `cell_px` pixels, linear between them."""
    for axis, size in ((0, height), (1, width)):
        position = np.arange(size, dtype=np.float32) / cell_px
        before = position.astype(int)
        weight = (position - before).reshape((-1, 1) if axis == 0 else (1, -1))
        grid = grid.take(before, axis) * (1 - weight) + grid.take(before + 1, axis) * weight
    return grid


def shifted(plane: np.ndarray, top_px: float, left_px: float, height: int, width: int) -> np.ndarray:
    """[height, width] uint8 of `plane` from a place between its pixels on: linear, in sixteenths of a pixel."""
    row, column = int(top_px), int(left_px)
    down, right = int((top_px - row) * 16), int((left_px - column) * 16)
    window = plane[row : row + height + 1, column : column + width + 1].astype(np.uint16)
    window = window[:-1] * (16 - down) + window[1:] * down
    return ((window[:, :-1] * (16 - right) + window[:, 1:] * right) >> 8).astype(np.uint8)
