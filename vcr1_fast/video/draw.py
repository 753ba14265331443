"""Pictures of an answer: a strip of frames over a bar in time, or boxes on frames. RGB arrays, and PNG by PyAV.

Shape letters: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vcr1_fast.types import Box, Interval
from vcr1_fast.video.read import read_resized
from vcr1_fast.video.reader import Probe, Reader

FRAME_HEIGHT_PX = 160
STRIP_FRAMES = 8
COLUMNS = 8  # of frames with boxes
BAR_PX = 24
LINE_PX = 2
Colour = tuple[int, int, int]
BACKGROUND, SPAN, GIVEN = (210, 210, 210), (225, 87, 30), (60, 130, 230)


def read_at(reader: Reader, probe: Probe, times_s: Sequence[float]) -> np.ndarray:
    """[F, FRAME_HEIGHT_PX, W, 3] uint8: what a player shows at each of the ascending instants. Raises SampleError."""
    shown = np.searchsorted(probe.times_s, np.array(times_s), side="right") - 1
    indices = [int(index) for index in shown.clip(0, len(probe.times_s) - 1)]
    width_px = max(1, round(FRAME_HEIGHT_PX * probe.width_px / probe.height_px))
    return read_resized(reader, probe, indices, FRAME_HEIGHT_PX, width_px).cpu().numpy()


def strip_times_s(duration_s: float) -> list[float]:
    """The middle of each of STRIP_FRAMES equal parts: a frame of the strip stands over its part of the bar."""
    return [duration_s * (i + 0.5) / STRIP_FRAMES for i in range(STRIP_FRAMES)]


def strip(frames_FHW3: np.ndarray, intervals_s: Sequence[Interval], duration_s: float) -> np.ndarray:
    """[H + BAR_PX, F W, 3]: the frames side by side; below them the whole duration, the intervals coloured.

    What lies outside of the video is cut off; an interval is at least a line wide.
    """
    row_HW3 = side_by_side(frames_FHW3)
    return np.concatenate([row_HW3, bar(row_HW3.shape[1], intervals_s, duration_s)])


def side_by_side(frames_FHW3: np.ndarray) -> np.ndarray:
    """[H, F W, 3]"""
    num_frames, height_px, width_px, _ = frames_FHW3.shape
    return frames_FHW3.transpose(1, 0, 2, 3).reshape(height_px, num_frames * width_px, 3)


def bar(width_px: int, intervals_s: Sequence[Interval], duration_s: float, colour: Colour = SPAN) -> np.ndarray:
    """[BAR_PX, width_px, 3]: the whole duration, the intervals coloured."""
    picture = np.full((BAR_PX, width_px, 3), BACKGROUND, np.uint8)
    colour_in(picture, intervals_s, duration_s, colour)
    return picture


def colour_in(
    bar_HW3: np.ndarray, spans_s: Sequence[Interval], duration_s: float, colour: Colour, line_px: int = LINE_PX
) -> None:
    """Periods of a bar that stands for the whole duration, in place; each at least a line wide."""
    width_px = bar_HW3.shape[1]
    for start_s, end_s in spans_s:
        left = min(pixel(start_s / duration_s, width_px), width_px - line_px)
        bar_HW3[:, left : max(pixel(end_s / duration_s, width_px), left + line_px)] = colour


def boxes_on_frames(frames_FHW3: np.ndarray, boxes: Sequence[Box], given: Box | None = None) -> np.ndarray:
    """[rows H, columns W, 3]: each frame with its box, at most COLUMNS in a row; on the first also the `given` one."""
    num_frames, height_px, width_px, _ = frames_FHW3.shape
    columns = min(COLUMNS, num_frames)
    rows = -(-num_frames // columns)
    picture = np.full((rows * height_px, columns * width_px, 3), BACKGROUND, np.uint8)
    for i, (frame_HW3, box) in enumerate(zip(frames_FHW3, boxes, strict=True)):
        drawn = frame_HW3.copy()
        outline(drawn, box, SPAN)
        if i == 0 and given is not None:
            outline(drawn, given, GIVEN)
        top, left = i // columns * height_px, i % columns * width_px
        picture[top : top + height_px, left : left + width_px] = drawn
    return picture


def outline(rgb_HW3: np.ndarray, box: Box, colour: Colour, line_px: int = LINE_PX) -> None:
    """Draw a box of corners as fractions, in place; what lies outside of the frame is cut off."""
    height_px, width_px, _ = rgb_HW3.shape
    left, right = sorted(pixel(x, width_px) for x in (box[0], box[2]))
    top, bottom = sorted(pixel(y, height_px) for y in (box[1], box[3]))
    inside = rgb_HW3[top : max(bottom, top + 1), left : max(right, left + 1)]
    for edge in (inside[:line_px], inside[-line_px:], inside[:, :line_px], inside[:, -line_px:]):
        edge[...] = colour


def pixel(frac: float, size_px: int) -> int:
    """Where a share of a length of so many pixels ends; shares outside of [0, 1] are moved to its ends."""
    return round(min(max(frac, 0.0), 1.0) * size_px)


def write_png(picture_HW3: np.ndarray, file: Path) -> None:
    """Raises OSError when it cannot be written."""
    context = av.CodecContext.create("png", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = picture_HW3.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HW3), format="rgb24")
    packets = [*context.encode(frame), *context.encode(None)]
    file.write_bytes(b"".join(bytes(packet) for packet in packets))
