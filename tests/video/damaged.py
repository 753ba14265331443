"""Files as a damaged data set has them, each made from a sound clip, with the class of the reason they are refused for.

A clip of these tests is an MP4 of up to 10 seconds and under a million pixels a frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.video import clips

MAX_SOURCE_PIXELS = 1 << 20  # `video.max_source_pixels` of the tests


def truncated(sound: Path, target: Path) -> None:
    """The first two thirds of the bytes, as a broken download leaves them; the index is at the end."""
    data = sound.read_bytes()
    target.write_bytes(data[: len(data) * 2 // 3])


def empty(sound: Path, target: Path) -> None:
    target.write_bytes(b"")


def text(sound: Path, target: Path) -> None:
    """What a server sends instead of a video."""
    target.write_text("<html><body>404 Not Found</body></html>\n" * 50)


def wrong_codec(sound: Path, target: Path) -> None:
    """A codec that FFmpeg does not know."""
    data = sound.read_bytes()
    assert b"avc1" in data and b"avcC" in data
    target.write_bytes(data.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))


def huge(sound: Path, target: Path) -> None:
    """A sound video with more pixels than the settings allow."""
    flat_clip(target, 2048, 1024, num_frames=1)


def bomb(sound: Path, target: Path) -> None:
    """4 KB that decode to 75 MB and say 64 x 64 px in the header of the file: 6 frames of one colour."""
    flat_clip(target, 2048, 2048, num_frames=6)
    data = bytearray(target.read_bytes())
    at = data.find(b"avc1", data.find(b"stsd")) + 28
    assert data[at : at + 4] == b"\x08\x00\x08\x00" and len(data) < 20_000
    data[at : at + 4] = b"\x00\x40\x00\x40"
    target.write_bytes(data)


def missing(sound: Path, target: Path) -> None:
    target.unlink(missing_ok=True)


# Kind -> (what makes such a file, its class of `quarantine.REASON_NAMES`; where FFmpeg may see it so or so, several)
KINDS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated": (truncated, "damaged|not_a_video|no_video"),
    "empty": (empty, "empty"),
    "text": (text, "not_a_video"),
    "wrong_codec": (wrong_codec, "not_decodable"),
    "huge": (huge, "too_large"),
    "bomb": (bomb, "too_large"),
    "missing": (missing, "missing"),
}


def is_class_of(kind: str, got: str) -> bool:
    return re.fullmatch(KINDS[kind][1], got) is not None


def flat_clip(path: Path, width_px: int, height_px: int, num_frames: int) -> None:
    pictures = [np.full((height_px * 3 // 2, width_px), 128, dtype=np.uint8)] * num_frames
    clips.write_clip(path, fps=8, size_px=(height_px, width_px), pictures=pictures, options={"preset": "ultrafast"})
