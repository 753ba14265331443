"""A name in `Example.sources`: a path, and behind it what is to be seen of it, after W3C Media Fragments. No torch.

/videos/a.mp4                                      the whole file
/videos/a.mp4#t=2.000,6.500                        the part between two times
/videos/a.mp4#t=2.000,6.500&fps=4                  the same at a rate of its own
/images/castle_s03e05_seg02_clip_13#images=all&fps=3    a folder of images, 3 of which were taken a second
/images/GOT-10k_Val_000010#images=7&fps=2          7 images at equal distances, declared to run at 2 a second
/images/GOT-10k_Val_000010#images=7&fps=2#t=0.000,2.000&fps=2     a part of that
/videos/a.mp4#focus=10.000,20.000;41.500,44.000    all of what stands before, its frames closer together in two periods
/images/a.jpg#image                                one image, which has no time; a file without this is a video
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vcr1_fast.types import Interval

FRAGMENT = "#t="
FOCUS = "#focus="
IMAGE = "#image"
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAME = re.compile(
    rf"(?P<path>.+?)(?:#images=(?P<num>[1-9]\d{{0,3}}|all)&fps=(?P<rate>{_NUMBER}))?"
    rf"(?:{FRAGMENT}(?P<start>{_NUMBER}),(?P<end>{_NUMBER}|inf)(?:&fps=(?P<fps>{_NUMBER}))?)?"
    rf"(?:{FOCUS}(?P<evidence>{_NUMBER},{_NUMBER}(?:;{_NUMBER},{_NUMBER})*))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class SourceName:
    """What such a name says. Text that does not read as a fragment is part of the path."""

    path: str  # file or folder on disk
    start_s: float = 0.0
    end_s: float = math.inf
    part_fps: float | None = None  # frames a second to sample of the part
    num_images: int | None = None  # None: all, or the name does not say
    images_fps: float | None = None
    evidence_s: tuple[Interval, ...] = ()  # in seconds of the part; see sampling.focus_indices
    is_image: bool = False

    @property
    def is_part(self) -> bool:
        return self.start_s > 0.0 or self.end_s < math.inf

    @staticmethod
    def parse(video: str) -> SourceName:
        if video.endswith(IMAGE):
            return SourceName(video.removesuffix(IMAGE), is_image=True)
        match = _NAME.fullmatch(video)
        if match is None:  # empty
            return SourceName(video)
        start_s, end_s = float(match["start"] or 0.0), float(match["end"] or math.inf)
        part_fps, images_fps = (float(match[key]) if match[key] else None for key in ("fps", "rate"))
        num_images = int(match["num"]) if match["num"] not in (None, "all") else None
        numbers = [float(number) for number in re.findall(_NUMBER, match["evidence"] or "")]
        evidence_s = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        return SourceName(match["path"], start_s, end_s, part_fps, num_images, images_fps, evidence_s)


def part_name(video: str, start_s: float, end_s: float, fps: float | None = None) -> str:
    """The part of `video`, which may be a part itself, between two of its seconds; without `fps` the settings say the
    rate."""
    whole = SourceName.parse(video)
    if whole.is_part:
        video = video[: video.rindex(FRAGMENT)]
        start_s, end_s = start_s + whole.start_s, min(end_s + whole.start_s, whole.end_s)
    return f"{video}{FRAGMENT}{start_s:.3f},{end_s:.3f}" + ("" if fps is None else f"&fps={fps:g}")


def folder_name(path: str, fps: float) -> str:
    """Path of a folder of images and how many of them were taken a second, in one text."""
    return f"{path}#images=all&fps={fps:g}"


def focus_name(video: str, evidence_s: Sequence[Interval]) -> str:
    """All of `video`, with frames closer together in these of its seconds."""
    return video + FOCUS + ";".join(f"{start_s:.3f},{end_s:.3f}" for start_s, end_s in evidence_s)


def images_name(path: str, num_images: int, fps: float) -> str:
    """Path and number of images, shown at `fps`, in one text."""
    return f"{path}#images={num_images}&fps={fps:g}"
