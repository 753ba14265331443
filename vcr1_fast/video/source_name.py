"""`Example.video`: a path, and behind it what is to be seen of it, after W3C Media Fragments. Imports no torch.

/videos/a.mp4                                      the whole file
/videos/a.mp4#t=2.000,6.500                        the part between two times
/videos/a.mp4#t=2.000,6.500&fps=4                  the same at a rate of its own
/images/castle_s03e05_seg02_clip_13#images=all&fps=3    a folder of images, 3 of which were taken a second
/images/GOT-10k_Val_000010#images=7&fps=2          7 images at equal distances, declared to run at 2 a second
/images/GOT-10k_Val_000010#images=7&fps=2#t=0.000,2.000&fps=2     a part of that
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

FRAGMENT = "#t="
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAME = re.compile(
    rf"(?P<path>.+?)(?:#images=(?P<num>[1-9]\d{{0,3}}|all)&fps=(?P<rate>{_NUMBER}))?"
    rf"(?:{FRAGMENT}(?P<start>{_NUMBER}),(?P<end>{_NUMBER}|inf)(?:&fps=(?P<fps>{_NUMBER}))?)?",
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

    @property
    def is_part(self) -> bool:
        return self.start_s > 0.0 or self.end_s < math.inf

    @staticmethod
    def parse(video: str) -> SourceName:
        match = _NAME.fullmatch(video)
        if match is None:  # empty
            return SourceName(video)
        start_s, end_s = float(match["start"] or 0.0), float(match["end"] or math.inf)
        part_fps, images_fps = (float(match[key]) if match[key] else None for key in ("fps", "rate"))
        num_images = int(match["num"]) if match["num"] not in (None, "all") else None
        return SourceName(match["path"], start_s, end_s, part_fps, num_images, images_fps)


def part_name(path: str, start_s: float, end_s: float, fps: float | None = None) -> str:
    """Path and part in one text; without `fps` the settings say the rate. Of a part, it is a part of that part."""
    whole = SourceName.parse(path)
    if whole.is_part:
        path = path[: path.rindex(FRAGMENT)]
        start_s, end_s = start_s + whole.start_s, min(end_s + whole.start_s, whole.end_s)
    return f"{path}{FRAGMENT}{start_s:.3f},{end_s:.3f}" + ("" if fps is None else f"&fps={fps:g}")


def folder_name(path: str, fps: float) -> str:
    """Path of a folder of images and how many of them were taken a second, in one text."""
    return f"{path}#images=all&fps={fps:g}"


def images_name(path: str, num_images: int, fps: float) -> str:
    """Path and number of images, shown at `fps`, in one text."""
    return f"{path}#images={num_images}&fps={fps:g}"
