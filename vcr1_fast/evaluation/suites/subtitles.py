"""Subtitles in front of the questions: FOLDER/NAME.srt for the video NAME.mp4, as Video-MME ships them.

Which ones: all, or those on screen at one of N frames at equal distances from the first to the last, as Video-MME asks
for (README of BradyFU/Video-MME; lmms-eval, tasks/videomme/utils.py, whose rule in frames is taken over).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vcr1_fast.prompts.annotation_files import read_text_file
from vcr1_fast.prompts.schemas.schema import Row
from vcr1_fast.settings.config import ConfigError, VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.source_name import SourceName

_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d+)"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}.*")
_TAG = re.compile(r"<[^<>]*>")  # <font color="white" size=".72c">
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")

Subtitle = tuple[float, float, str]  # from, to, in seconds; text without tags


@dataclass(slots=True)
class Subtitles:
    """The subtitles of a folder, and for how many questions there were none."""

    folder: Path
    num_frames: int | None = None  # those at that many frames; None: all
    num_without: int = 0
    _texts: dict[str, str] = field(default_factory=dict)  # path of the video -> what is said in it

    def added(self, row: Row) -> Row:
        """The row with the subtitles in its query. Raises ValueError where the video's frames have to be known, but
        cannot be read."""
        path = SourceName.parse(str(row["video"])).path
        if path not in self._texts:
            self._texts[path] = self._text(path)
        if not self._texts[path]:
            self.num_without += 1
            return row
        return row | {"query": f"Subtitles of the video:\n{self._texts[path]}\n\nQuestion: {row['query']}"}

    def _text(self, path: str) -> str:
        file = self.folder / f"{Path(path).stem}.srt"
        if not file.exists():
            return ""
        try:
            subtitles = parse_subtitles(read_text_file(file))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.num_frames is not None and subtitles:
            subtitles = shown_subtitles(subtitles, *_frames_of(path), self.num_frames)
        return "\n".join(text for _, _, text in subtitles)


def parse_subtitles(text: str) -> list[Subtitle]:
    """The subtitles of a SubRip file in its order; those without a word, and blocks without times, are left out."""
    found: list[Subtitle] = []
    for block in _BLANK_LINE.split(text.replace("\r\n", "\n")):
        lines = block.split("\n")
        times = [_TIMES.fullmatch(line) for line in lines]
        at = next((i for i, match in enumerate(times) if match), None)
        if at is None or (match := times[at]) is None:
            continue
        words = " ".join(_TAG.sub("", line).strip() for line in lines[at + 1 :]).strip()
        if words:
            found.append((_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), words))
    return found


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")


def shown_subtitles(
    subtitles: Sequence[Subtitle], num_native: int, native_fps: float, num_frames: int
) -> list[Subtitle]:
    """Those on screen at one of `num_frames` frames of the `num_native` there are, first and last included.

    A subtitle is on screen from frame int(start * fps) up to, and not at, frame int(end * fps).
    """
    frames = np.linspace(0, num_native - 1, num_frames, dtype=int)
    return [
        (start_s, end_s, text)
        for start_s, end_s, text in subtitles
        if bool(((frames >= int(start_s * native_fps)) & (frames < int(end_s * native_fps))).any())
    ]


def _frames_of(path: str) -> tuple[int, float]:
    """Number of frames of a video and how many there are a second. Raises ValueError."""
    from vcr1_fast.video.read import open_reader  # loads torch
    from vcr1_fast.video.sampling import native_rate

    try:
        times_s = open_reader(VideoConfig(reader="pyav")).probe(path).times_s
        return len(times_s), float(native_rate(times_s)[0]) if len(times_s) > 1 else 1.0
    except SampleError as error:
        raise ValueError(f"which subtitles belong to its frames is not known: {error}") from error
