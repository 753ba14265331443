"""Clips in which every two properties of a file meet: codec, container, rate, turn, size and colours.

All combinations would be 2,474 files. Readers go wrong where one property meets another (a turned file of odd size,
full range in a container that cannot say so), so each pair of values that one file can have is in one of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, product
from typing import NamedTuple

from tests.video.corpus import NTSC, VARIABLE_MS, Clip

CONTAINERS = {
    "h264": ("mp4", "mov", "mkv", "avi", "ts"),
    "hevc": ("mp4", "mov", "mkv", "ts"),
    "mpeg4": ("mp4", "mov", "mkv", "avi"),
    "vp8": ("webm", "mkv"),
    "vp9": ("webm", "mkv", "mp4"),
    "av1": ("mp4", "mkv", "webm"),
    "mjpeg": ("avi", "mov", "mkv"),
}
RATES: dict[str, Fraction | int] = {"24": 24, "25": 25, "ntsc": NTSC, "60": 60, "variable": 25}
TURNS = ("0", "90", "180", "270")
SIZES_PX = {"even": (64, 96), "cropped": (70, 98), "odd": (67, 99)}  # cropped: multiples of neither 16 nor 8
EVEN_AV1_PX = (64, 64)  # SVT-AV1 writes some frame of 64 x 96 as a copy of another
COLORS = ("unsaid", "601", "601full", "709", "709full")


class Properties(NamedTuple):
    """What a clip is made of, by the names above."""

    codec: str
    container: str
    rate: str
    turn: str
    size: str
    colors: str

    def can_be(self) -> bool:
        """Whether the writers of FFmpeg make such a file, and it says what it is."""
        if self.turn != "0" and self.container not in ("mp4", "mov"):  # by their display matrix
            return False
        if self.rate == "variable" and self.container == "avi":
            return False
        if self.size == "odd" and self.codec in ("h264", "hevc", "av1"):  # their encoders want even sides in 4:2:0
            return False
        match self.codec:
            case "mjpeg":
                return self.colors == "601full"
            case "vp8":
                return self.colors == "unsaid"
            case "mpeg4":  # only the container says it: AVI nothing, MOV no range
                is_said = self.container not in ("avi", *(["mov"] if self.colors.endswith("full") else []))
                return self.colors == "unsaid" or is_said
        return True

    def pairs(self) -> set[tuple[int, str, int, str]]:
        """All pairs of two of its properties."""
        return {(i, self[i], j, self[j]) for i, j in combinations(range(len(self)), 2)}

    def clip(self) -> Clip:
        is_full_range = self.colors.endswith("full")
        return Clip(
            name=f"{'-'.join([self.codec, *self[2:]])}.{self.container}",
            codec=self.codec,
            suffix=self.container,
            fps=RATES[self.rate],
            size_px=EVEN_AV1_PX if (self.codec, self.size) == ("av1", "even") else SIZES_PX[self.size],
            turn_deg=int(self.turn),
            matrix="709" if self.colors.startswith("709") else "601",
            is_full_range=is_full_range,
            is_tagged=self.colors != "unsaid" and self.codec != "mjpeg",
            pix_fmt="yuvj420p" if self.codec == "mjpeg" else "yuv420p",
            times_ms=VARIABLE_MS if self.rate == "variable" else None,
        )


def all_properties() -> Iterator[Properties]:
    """Every combination that can be."""
    for codec, containers in CONTAINERS.items():
        for values in product((codec,), containers, RATES, TURNS, SIZES_PX, COLORS):
            properties = Properties(*values)
            if properties.can_be():
                yield properties


CHOSEN = """
h264 mp4 60 180 even 709
h264 mp4 variable 90 cropped unsaid
h264 mov ntsc 270 even 601full
h264 mov variable 0 even unsaid
h264 mkv variable 0 even 601
h264 avi 24 0 even 601
h264 avi 25 0 cropped 709full
h264 avi ntsc 0 cropped 709
h264 ts 25 0 cropped 709full
h264 ts 60 0 cropped 601
hevc mp4 60 270 even unsaid
hevc mov 25 180 even 601
hevc mov variable 90 even 709full
hevc mkv 24 0 cropped 709
hevc ts 24 0 cropped 709
hevc ts ntsc 0 even 601full
hevc ts variable 0 even unsaid
mpeg4 mp4 ntsc 180 odd 709full
mpeg4 mp4 variable 0 odd 709
mpeg4 mov 25 270 odd 709
mpeg4 mov ntsc 90 cropped unsaid
mpeg4 mov 60 90 odd 601
mpeg4 mkv 60 0 odd 601full
mpeg4 avi 24 0 odd unsaid
mpeg4 avi 25 0 even unsaid
vp8 webm 24 0 odd unsaid
vp8 webm 25 0 cropped unsaid
vp8 webm 60 0 cropped unsaid
vp8 mkv ntsc 0 odd unsaid
vp8 mkv variable 0 even unsaid
vp9 webm 60 0 odd 709full
vp9 webm variable 0 cropped 601full
vp9 mkv ntsc 0 even 709
vp9 mp4 24 180 odd unsaid
vp9 mp4 25 90 odd 601full
vp9 mp4 variable 270 cropped 601
av1 mp4 24 90 even 709
av1 mp4 60 270 even 709full
av1 mp4 variable 180 cropped 601full
av1 mkv 24 0 cropped 709full
av1 webm 25 0 cropped unsaid
av1 webm ntsc 0 even 601
av1 webm variable 0 even 709
mjpeg avi 60 0 cropped 601full
mjpeg mov 24 270 even 601full
mjpeg mov ntsc 180 odd 601full
mjpeg mov variable 90 even 601full
mjpeg mkv 25 0 odd 601full
"""
PROPERTIES = tuple(Properties(*line.split()) for line in CHOSEN.strip().splitlines())
CLIPS = tuple(properties.clip() for properties in PROPERTIES)
