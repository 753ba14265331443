"""What the first bytes of a JPEG, PNG, WebP or BMP say: codec, size, and which way up it is to be shown.

Known before anything is decoded, so that a file of a few kilobytes cannot ask for gigabytes.
Layouts: ITU-T T.81 annex B (JPEG), W3C PNG, Google's WebP container, Exif 2.32 (TIFF 6.0) for the orientation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
EXIF_ORIENTATION = 0x0112
JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of frame headers
JPEG_ALONE = frozenset(range(0xD0, 0xD9)) | {0x01}  # markers without a length


class AnimatedImageError(ValueError):
    """Several pictures in a form that FFmpeg does not decode; the message says "it is ..."."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Of one image file."""

    codec: str  # FFmpeg's name
    width_px: int  # as stored
    height_px: int
    orientation: int  # as in Exif: 1 upright, 2 to 8 turned or mirrored

    @property
    def is_transposed(self) -> bool:
        return self.orientation >= 5

    @property
    def turn(self) -> tuple[bool, bool, bool]:
        """(transpose, mirror left-right, flip top-bottom), in that order, to show it upright."""
        is_mirrored, is_flipped = self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)
        return self.is_transposed, is_mirrored, is_flipped


def read_image_header(data: bytes) -> ImageHeader:
    """Raises ValueError when this is none of the four kinds or its header is cut short, AnimatedImageError for WebP."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith(b"BM"):
            width_px, height_px = struct.unpack_from("<ii", data, 18)
            return ImageHeader("bmp", abs(width_px), abs(height_px), 1)  # negative height: rows from top to bottom
    except (struct.error, IndexError) as error:
        raise ValueError("its header is cut short") from error
    raise ValueError("it is not a JPEG, PNG, WebP or BMP")


def _jpeg(data: bytes) -> ImageHeader:
    at, orientation = 2, 1
    while True:
        if data[at] != 0xFF:
            raise ValueError("its header is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in JPEG_ALONE:
            at += 2
        elif marker in JPEG_SIZES:
            height_px, width_px = struct.unpack_from(">HH", data, at + 5)
            return ImageHeader("mjpeg", width_px, height_px, orientation)
        elif marker in (0xD9, 0xDA):
            raise ValueError("its header states no size")
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _exif_orientation(data[at + 10 : at + 2 + length])
            at += 2 + length


def _png(data: bytes) -> ImageHeader:
    width_px, height_px = struct.unpack_from(">II", data, 16)
    at, orientation = 8, 1
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length])
        at += 12 + length
    return ImageHeader("png", width_px, height_px, orientation)


def _webp(data: bytes) -> ImageHeader:
    at, orientation, size_px = 12, 1, None
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        body = at + 8
        if kind == b"VP8X":
            if data[body] & 2:
                raise AnimatedImageError("it is an animated WebP")
            size_px = _uint24(data, body + 4) + 1, _uint24(data, body + 7) + 1
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, body + 6)
            size_px = size_px or (width & 0x3FFF, height & 0x3FFF)
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, body + 1)
            size_px = size_px or ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"EXIF":
            orientation = _exif_orientation(data[body : body + length].removeprefix(b"Exif\0\0"))
        at = body + length + length % 2
    if size_px is None:
        raise ValueError("its header states no size")
    return ImageHeader("webp", *size_px, orientation)


def _uint24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


def _exif_orientation(tiff: bytes) -> int:
    """1 where it says nothing, or nothing that can be understood: cameras write a lot into Exif."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(num_entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
