"""An answer drawn into its clip: every frame again with boxes on it, or with a bar in time at its bottom. MP4 by PyAV.

Shape letters: N frames of the clip, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Colorspace, VideoReformatter

from vcr1_fast.run.telemetry import progress
from vcr1_fast.types import Box, Interval
from vcr1_fast.video.draw import BACKGROUND, GIVEN, LINE_PX, SPAN, colour_in, outline
from vcr1_fast.video.reader import Probe, Reader

TICKS_PER_S = 60_000  # whole ticks for a frame at 24, 25, 30, 50, 60 and 30000/1001 a second; MPEG-4 takes up to 65,535
CODECS = {"libx264": {"crf": "18", "preset": "veryfast"}, "mpeg4": {"b": "20M"}}  # the first that FFmpeg has here
BT709 = 1  # in FFmpeg's list of colour spaces
PLAYHEAD = (20, 20, 20)

Mark = Callable[[np.ndarray, float], None]  # draws into a frame [H, W, 3], in place, given its time in seconds


def span_mark(intervals_s: Sequence[Interval], duration_s: float) -> Mark:
    """A bar over the bottom: the whole duration, the intervals coloured, a line at the frame's own time."""

    def mark(rgb_HW3: np.ndarray, time_s: float) -> None:
        height_px = rgb_HW3.shape[0]
        bar, line_px = rgb_HW3[-max(height_px // 12, 3 * LINE_PX) :], _line_px(height_px)
        bar[...] = BACKGROUND
        for spans_s, colour in ((intervals_s, SPAN), ([(time_s, time_s)], PLAYHEAD)):
            colour_in(bar, spans_s, duration_s, colour, line_px)

    return mark


def box_mark(boxes: Sequence[Box], times_s: Sequence[float], given: Box | None = None) -> Mark:
    """On each frame the box whose instant is nearest; with the first one also the `given` one. Instants ascend."""
    changes_s = [(earlier + later) / 2 for earlier, later in pairwise(times_s)]

    def mark(rgb_HW3: np.ndarray, time_s: float) -> None:
        line_px = _line_px(rgb_HW3.shape[0])
        index = int(np.searchsorted(changes_s, time_s, side="right"))
        outline(rgb_HW3, boxes[index], SPAN, line_px)
        if index == 0 and given is not None:
            outline(rgb_HW3, given, GIVEN, line_px)

    return mark


def _line_px(height_px: int) -> int:
    return max(LINE_PX, height_px // 240)


def write_clip(file: Path, reader: Reader, probe: Probe, mark: Mark) -> None:
    """The video of `probe` with each frame marked, in its size and at its times, without its sound.

    The file appears whole or not at all. Raises SampleError when the video cannot be read, OSError when the file cannot
    be written.
    """
    aside = file.with_name(f"{file.stem}.tmp-{os.getpid()}.mp4")
    try:
        _encode(aside, probe, _marked(reader, probe, mark))
        aside.replace(file)
    except FFmpegError as error:
        raise OSError(f"{file} cannot be written ({error.strerror or error})") from error
    finally:
        aside.unlink(missing_ok=True)


def _marked(reader: Reader, probe: Probe, mark: Mark) -> Iterator[np.ndarray]:
    frames = reader.read(probe, range(len(probe.times_s)))
    for rgb_HW3, time_s in zip(progress(frames, "drawing", len(probe.times_s)), probe.times_s.tolist(), strict=True):
        drawn = rgb_HW3.copy()
        mark(drawn, time_s)
        yield drawn


def _encode(file: Path, probe: Probe, frames: Iterator[np.ndarray]) -> None:
    codec = next(name for name in CODECS if name in av.codecs_available)
    ticks = np.rint(probe.times_s * TICKS_PER_S).astype(np.int64)
    is_odd = probe.width_px % 2 or probe.height_px % 2  # which x264 takes only with a colour for each pixel
    layout, converter = "yuv444p" if is_odd and codec == "libx264" else "yuv420p", VideoReformatter()
    with av.open(str(file), "w", format="mp4") as container:
        rate = Fraction(len(ticks) / probe.duration_s).limit_denominator(1001) if probe.duration_s > 0 else Fraction(1)
        stream: Any = container.add_stream(codec, rate=rate, options=CODECS[codec])
        stream.width, stream.height, stream.pix_fmt = probe.width_px, probe.height_px, layout
        stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
        stream.codec_context.colorspace = BT709
        for tick, rgb_HW3 in zip(ticks.tolist(), frames, strict=True):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HW3), format="rgb24")
            frame = converter.reformat(rgb, format=layout, dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = tick, Fraction(1, TICKS_PER_S)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
