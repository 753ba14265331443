"""Small clips of known content, one for each thing that readers get wrong: codec, container, rate, turn, size, colour.

Frame k < 256 shows, above, eight saturated colours side by side and, below, k as eight columns, black for 0 and white
for 1. So a test knows which frame it got, which way up, and whether its colours are those that were painted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.video import clips

NTSC = Fraction(30000, 1001)
NUM_FRAMES = 20
KEYFRAME_INTERVAL = 10

# Red, green, blue, yellow, cyan, magenta, orange, grey: the matrices of BT.601 and BT.709 differ most on these.
BARS_83 = np.array(
    [
        [230, 20, 20],
        [20, 230, 20],
        [20, 20, 230],
        [230, 230, 20],
        [20, 230, 230],
        [230, 20, 230],
        [230, 128, 20],
        [128] * 3,
    ],
    dtype=np.uint8,
)
# How much red and blue weigh in luma, and the number ISO 23091-2 gives the matrix (table 4)
MATRICES = {"601": (0.299, 0.114, 6), "709": (0.2126, 0.0722, 1)}

ENCODERS = {
    "h264": ("libx264", {"bf": "2", "b_strategy": "0", "sc_threshold": "0", "crf": "2", "preset": "superfast"}),
    "hevc": ("libx265", {"preset": "superfast", "crf": "2", "x265-params": "bframes=2:log-level=none:pools=1"}),
    "mpeg4": ("mpeg4", {"bf": "2", "qmin": "1", "qmax": "2", "b": "4000000"}),
    "vp8": ("libvpx", {"crf": "4", "b": "4000000", "qmax": "6", "deadline": "realtime", "cpu-used": "4"}),
    "vp9": ("libvpx-vp9", {"crf": "2", "b": "0", "deadline": "realtime", "cpu-used": "6"}),
    "av1": ("libsvtav1", {"crf": "4", "preset": "12", "svtav1-params": "lp=1"}),
    "mjpeg": ("mjpeg", {"qmin": "1", "qmax": "2"}),
}


@dataclass(frozen=True)
class Clip:
    """One file and what a player shows of it."""

    name: str
    codec: str
    suffix: str
    fps: Fraction | int = 25
    size_px: tuple[int, int] = (48, 64)  # height and width as stored, before the turn
    turn_deg: int = 0  # clockwise: how the display matrix asks to turn the stored picture
    matrix: str = "601"  # what the picture was painted with
    is_full_range: bool = False
    is_tagged: bool = False  # the file declares matrix and range; where it does not, FFmpeg takes BT.601, limited
    pix_fmt: str = "yuv420p"
    times_ms: tuple[int, ...] | None = None  # presentation times of a file of variable rate
    shift_s: float = 0.0  # packets are copied into a second file so much later; earlier: an edit list hides the start
    edit_ms: int | None = None  # an edit list hides what comes after so many milliseconds
    options: tuple[tuple[str, str], ...] = ()  # of the container

    @property
    def written_s(self) -> np.ndarray:
        """[NUM_FRAMES] presentation times in seconds, before shift and edit list."""
        if self.times_ms:
            return np.array(self.times_ms) / 1000
        return np.arange(NUM_FRAMES) / float(self.fps)

    @property
    def shown_indices(self) -> list[int]:
        """Which of the painted frames a player shows, in order."""
        start_s = max(0.0, -self.shift_s) - 1e-6
        end_s = np.inf if self.edit_ms is None else self.edit_ms / 1000 - 1e-6
        return [k for k, time_s in enumerate(self.written_s) if start_s <= time_s < end_s]

    @property
    def times_s(self) -> np.ndarray:
        """When they are shown, in seconds after the first of them."""
        shown_s = self.written_s[self.shown_indices]
        return shown_s - shown_s[0]

    @property
    def displayed_px(self) -> tuple[int, int]:
        """(height, width) after the turn."""
        height, width = self.size_px
        return (width, height) if self.turn_deg % 180 else (height, width)


VARIABLE_MS = (0, 40, 80, 120, 500, 540, 580, 620, 1400, *range(1433, 1800, 34))[:NUM_FRAMES]
LIVE = (("live", "1"),)  # Matroska as a stream: neither duration nor index
FRAGMENTED = (("movflags", "frag_keyframe+empty_moov"),)  # MP4 as a stream: the header says 0 frames and 0 s

CLIPS = (  # what corpus_pairs.py has not
    Clip("h264-odd-444.mp4", "h264", "mp4", size_px=(49, 65), pix_fmt="yuv444p"),
    Clip("vp9-444.mkv", "vp9", "mkv", pix_fmt="yuv444p"),
    Clip("h264-10-bit.mp4", "h264", "mp4", pix_fmt="yuv420p10le"),
    # edit lists, late starts, no duration
    Clip("h264-edit-start.mp4", "h264", "mp4", shift_s=-0.6),
    Clip("h264-edit-end.mp4", "h264", "mp4", edit_ms=400),
    Clip("vp9-edit-start.mp4", "vp9", "mp4", shift_s=-0.6),
    Clip("vp9-edit-end.mp4", "vp9", "mp4", edit_ms=400),
    Clip("mpeg4-edit-start.mov", "mpeg4", "mov", shift_s=-0.6),
    Clip("h264-late.mp4", "h264", "mp4", shift_s=2.0),
    Clip("h264-late.mkv", "h264", "mkv", shift_s=2.0),
    Clip("h264-late.ts", "h264", "ts", shift_s=2.0),
    Clip("vp9-late.webm", "vp9", "webm", shift_s=2.0),
    Clip("h264-live.mkv", "h264", "mkv", options=LIVE),
    Clip("vp8-live.webm", "vp8", "webm", options=LIVE),
    Clip("h264-fragmented.mp4", "h264", "mp4", options=FRAGMENTED),
)


def write(clip: Clip, folder: Path) -> Path:
    """Encode the clip into `folder`, then change what no encoder writes."""
    path = folder / clip.name
    if clip.shift_s:
        plain = folder / f"plain-{path.stem}.mp4"  # Matroska keeps no decoding times to copy, MPEG-TS starts at 1.4 s
        _encode(clip, plain)
        clips.copy_packets(plain, path, clip.shift_s)
        plain.unlink()
    else:
        _encode(clip, path)
    if clip.turn_deg:
        a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clip.turn_deg]
        clips.patch_matrix(path, path, a, b, -b, a)
    if clip.edit_ms is not None:
        clips.patch_edit_duration(path, path, clip.edit_ms)
    return path


def enlarged(clip: Clip) -> Clip:
    """The same at 4 times the size, odd sides stay odd: NVDEC takes nothing below 144 px of some codecs."""
    height, width = clip.size_px
    return replace(clip, size_px=(4 * height + height % 2, 4 * width + width % 2))


def paint(clip: Clip, index: int) -> np.ndarray:
    """[H, W, 3] uint8 as stored."""
    height, width = clip.size_px
    rgb_HW3 = clips.numbered(index, height, width)
    rgb_HW3[: height // 4 * 2] = BARS_83[np.arange(width) * 8 // width]
    return rgb_HW3


def index_of(stored_HW3: np.ndarray) -> int:
    """Which frame this is; the picture as stored, not as displayed."""
    return clips.index_of(stored_HW3[stored_HW3.shape[0] // 4 * 2 + 2 :])


def as_stored(displayed_HW3: np.ndarray, clip: Clip) -> np.ndarray:
    """Turn a displayed picture back."""
    return np.rot90(displayed_HW3, clip.turn_deg // 90)


def bars_of(stored_HW3: np.ndarray) -> np.ndarray:
    """[8, 3] float64: the colour in the middle of each bar, away from edges that codec and subsampling blur."""
    height, width, _ = stored_HW3.shape
    rows = stored_HW3[4 : height // 4 * 2 - 4]
    middles = [(2 * bar + 1) * width // 16 for bar in range(8)]
    return np.stack([rows[:, middle - 1 : middle + 1].mean((0, 1)) for middle in middles])


def _encode(clip: Clip, path: Path) -> None:
    encoder, options = ENCODERS[clip.codec]
    height, width = clip.size_px
    with av.open(str(path), "w", options=dict(clip.options)) as out:
        stream: Any = out.add_stream(encoder, rate=Fraction(clip.fps))
        stream.width, stream.height, stream.pix_fmt = width, height, clip.pix_fmt
        stream.options = {**options, "g": str(KEYFRAME_INTERVAL), "threads": "1"}
        time_base = Fraction(1, 1000) if clip.times_ms else 1 / Fraction(clip.fps)
        context = stream.codec_context
        context.time_base = time_base
        if clip.is_full_range or clip.is_tagged:
            context.color_range = 2 if clip.is_full_range else 1
        if clip.is_tagged:
            context.colorspace = context.color_primaries = context.color_trc = MATRICES[clip.matrix][2]
        for k in range(NUM_FRAMES):
            frame = _to_yuv(clip, paint(clip, k))
            frame.pts, frame.time_base = clip.times_ms[k] if clip.times_ms else k, time_base
            if clip.is_full_range or clip.is_tagged:
                frame.color_range = context.color_range
            if clip.is_tagged:
                frame.colorspace = context.colorspace
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _to_yuv(clip: Clip, rgb_HW3: np.ndarray) -> av.VideoFrame:
    """Y = kr R + kg G + kb B, U = (B - Y) / (2 - 2 kb), V = (R - Y) / (2 - 2 kr), quantised as ISO 23091-2 says."""
    kr, kb, _ = MATRICES[clip.matrix]
    red, green, blue = (rgb_HW3[..., channel] / 255 for channel in range(3))
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    luma_scale, luma_zero, chroma_scale = (255, 0, 255) if clip.is_full_range else (219, 16, 224)
    planes = [luma * luma_scale + luma_zero, *(values * chroma_scale + 128 for values in chroma)]
    if "420" in clip.pix_fmt:
        planes[1:] = [_halved(values) for values in planes[1:]]
    frame = av.VideoFrame(rgb_HW3.shape[1], rgb_HW3.shape[0], clip.pix_fmt)
    is_10_bit = clip.pix_fmt.endswith("10le")
    for plane, values in zip(frame.planes, planes, strict=True):
        item = np.dtype("<u2" if is_10_bit else "u1")
        buffer = np.zeros((plane.height, plane.line_size // item.itemsize), item)
        buffer[:, : plane.width] = (values * (4 if is_10_bit else 1)).round().clip(0, 1023 if is_10_bit else 255)
        plane.update(buffer.tobytes())
    return frame


def _halved(values_HW: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels, rounded up where a side is odd."""
    height, width = values_HW.shape
    even = np.pad(values_HW, ((0, height % 2), (0, width % 2)), mode="edge")
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2).mean((1, 3))
