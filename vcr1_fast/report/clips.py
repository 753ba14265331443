"""The clips of a report: which are shown, their frames as small JPEGs, predicted and true periods and boxes."""

from __future__ import annotations

import base64
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from vcr1_fast.report.data import Evaluation, Said
from vcr1_fast.tasks.answer_format import clip as clip_text
from vcr1_fast.tasks.answer_format import read_period, tag_blocks
from vcr1_fast.tasks.glue_format import read_glue
from vcr1_fast.types import Interval, SampleError
from vcr1_fast.video.image_folder_reader import ImageFolderReader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe

MAX_CLIPS = 12
MAX_FRAMES = 6  # of a strip
FRAME_WIDTH_PX = 176
MAX_DURATION_S = 600.0  # a reader decodes all frames up to the last wanted one
READ_BUDGET_S = 30.0  # for the frames of all clips; a training waits for them at its end
MAX_BARS = 20  # periods of one answer
_BOX = re.compile(r"\[" + r", ?".join([r"(-?\d{1,9}(?:\.\d{0,9})?)"] * 4) + r"\]")


@dataclass(frozen=True)
class Bar:
    """A period as a share of the clip."""

    start_frac: float
    frac: float
    text: str


@dataclass(frozen=True)
class Picture:
    """A frame with boxes in fractions of its size: (x, y, width, height)."""

    source: str  # data URI of a JPEG
    time_s: float
    true_box: tuple[float, float, float, float] | None = None
    said_box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Clip:
    """One answer as the page shows it."""

    said: Said
    before: Said | None  # of an earlier evaluation
    think: str
    true_bars: list[Bar]
    said_bars: list[Bar]
    duration_s: float  # 0: not known
    pictures: list[Picture]
    note: str  # why there are no pictures


Pairs = list[tuple[Said, Said | None]]


def choose(evaluations: Sequence[Evaluation], trained_on: Sequence[Said]) -> list[tuple[str, Pairs]]:
    """Title -> answers with those of the evaluation before: most improved, best, worst; at most MAX_CLIPS, no clip
    twice. Without an evaluation: those of training."""
    if not evaluations:
        ranked = sorted(trained_on, key=lambda said: said.score, reverse=True)
        half = MAX_CLIPS // 2
        best, rest = ranked[:half], ranked[half:]
        groups = [("Best of the last samples of training", best), ("Worst of them", rest[::-1][:half])]
        return [(title, [(said, None) for said in chosen]) for title, chosen in groups if chosen]
    earlier = {(said.task, said.id): said for said in evaluations[-2].said} if len(evaluations) > 1 else {}
    pairs = [(said, earlier.get((said.task, said.id))) for said in evaluations[-1].said]
    gains = [(said, old) for said, old in pairs if old is not None and said.score > old.score]
    gains.sort(key=lambda pair: pair[0].score - pair[1].score, reverse=True)  # type: ignore[union-attr]
    best = sorted(pairs, key=lambda pair: pair[0].score, reverse=True)
    share, taken, found = MAX_CLIPS // 3, set[tuple[str, str]](), list[tuple[str, Pairs]]()
    for title, candidates in (("Most improved", gains), ("Best", best), ("Worst", best[::-1])):
        new = [pair for pair in candidates if (pair[0].task, pair[0].id) not in taken][:share]
        taken |= {(said.task, said.id) for said, _ in new}
        if new:
            found.append((title, new))
    return found


class ClipMaker:
    """Makes the clips of one page; all of them share READ_BUDGET_S."""

    def __init__(self, image_folder_fps: float = 2.0, budget_s: float = READ_BUDGET_S) -> None:
        self._image_folder_fps, self._ends = image_folder_fps, time.monotonic() + budget_s

    def clip(self, said: Said, before: Said | None = None) -> Clip:
        """Never raises for a video that cannot be read: the clip then has a note."""
        pictures, duration_s, note = [], 0.0, ""
        try:
            if not said.video:
                raise ValueError("no video was shown")
            reader = ImageFolderReader(self._image_folder_fps) if os.path.isdir(said.video) else PyavReader()
            probe = reader.probe(said.video)
            duration_s = probe.duration_s
            pictures = list(self._pictures(reader, probe, said))
        except (SampleError, OSError, ValueError, FFmpegError) as error:
            note = f"no pictures: {error}"
        true, predicted = true_periods(clip_text(said.truth)), said_periods(clip_text(said.parsed))
        if said.times_s:  # boxes are no periods, whatever else the answer says
            true, predicted = [], []
        length_s = duration_s or max((end for _, end in (*true, *predicted)), default=0.0)
        think = "\n".join(tag_blocks(clip_text(said.answer), "think")).strip()
        bars = (_bars(true, length_s), _bars(predicted, length_s))
        return Clip(said, before, think, bars[0], bars[1], duration_s, pictures, note)

    def _pictures(self, reader: PyavReader | ImageFolderReader, probe: Probe, said: Said) -> Iterator[Picture]:
        """Frames evenly over the clip, or at the instants of the boxes. Raises ValueError where that takes long."""
        if probe.duration_s > MAX_DURATION_S:
            raise ValueError(f"the clip is longer than {MAX_DURATION_S:.0f} s")
        if time.monotonic() > self._ends:
            raise ValueError("the time for reading frames was over")
        true, predicted = boxes(said.truth), boxes(said.parsed)
        instants = [at for at in said.times_s if isinstance(at, int | float) and math.isfinite(at)]
        places = _spread(len(instants)) if instants else list(range(MAX_FRAMES))
        wanted_s = instants or [(i + 0.5) / MAX_FRAMES * probe.duration_s for i in range(MAX_FRAMES)]
        last = len(probe.times_s) - 1
        nearest = [int(np.abs(probe.times_s - wanted_s[place]).argmin()) for place in places]
        order = sorted(zip(nearest, places, strict=True))
        frames = reader.read(probe, [min(index, last) for index, _ in order])
        for (index, place), rgb_HW3 in zip(order, frames, strict=False):
            if time.monotonic() > self._ends:
                return
            marks = (_at(true, place), _at(predicted, place)) if instants else (None, None)
            yield Picture(jpeg(rgb_HW3), float(probe.times_s[index]), marks[0], marks[1])


def _spread(count: int) -> list[int]:
    """At most MAX_FRAMES of 0..count-1, first and last included, evenly."""
    if count <= MAX_FRAMES:
        return list(range(count))
    return [round(i * (count - 1) / (MAX_FRAMES - 1)) for i in range(MAX_FRAMES)]


def _at(found: Sequence[tuple[float, float, float, float]], place: int) -> tuple[float, float, float, float] | None:
    return found[place] if place < len(found) else None


def true_periods(text: str) -> list[Interval]:
    """Those of a truth as tasks/shown.py writes it: "1.00 to 2.50, 4.00 to 5.00", or a list behind a letter."""
    listed = [period for part in text.split(", ") if (period := read_period(part))]
    return _in_order(_read_list(text) or listed)


def said_periods(text: str) -> list[Interval]:
    """What the rewards read in an answer: a list of periods, or the last "X to Y"."""
    period = read_period(text)
    return _in_order(_read_list(text) or ([period] if period else []))


def _read_list(text: str) -> list[Interval] | None:
    """The list that a text is, or what stands below its first line is."""
    return read_glue(text) or read_glue(text.partition("\n")[2])


def _in_order(found: Sequence[Interval]) -> list[Interval]:
    return [(max(start_s, 0.0), end_s) for start_s, end_s in found[:MAX_BARS] if max(start_s, 0.0) < end_s]


def boxes(text: str) -> list[tuple[float, float, float, float]]:
    """All "[x0, y0, x1, y1]" of a text as (x, y, width, height), cut to the picture."""
    found = []
    for match in _BOX.finditer(clip_text(text)):
        x0, y0, x1, y1 = (min(max(float(group), 0.0), 1.0) for group in match.groups())
        found.append((x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)))
    return found


def _bars(found: Sequence[tuple[float, float]], length_s: float) -> list[Bar]:
    bars = []
    for start_s, end_s in found:
        start, end = (min(at / length_s, 1.0) for at in (start_s, end_s))
        bars.append(Bar(round(start, 4), round(end - start, 4), f"{start_s:g} to {end_s:g} s"))
    return bars


def jpeg(rgb_HW3: np.ndarray, width_px: int = FRAME_WIDTH_PX) -> str:
    """A data URI of the frame, shrunk to `width_px`."""
    height, width = rgb_HW3.shape[:2]
    size = (min(width_px, width) // 2 * 2 or 2, max(round(height * min(width_px / width, 1.0)) // 2 * 2, 2))
    small = VideoFrame.from_ndarray(rgb_HW3, format="rgb24").reformat(*size, format="yuvj420p")
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = *size, "yuvj420p", Fraction(1, 25)
    encoder.options = {"q:v": "5"}
    data = b"".join(bytes(packet) for packet in (*encoder.encode(small), *encoder.encode(None)))
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
