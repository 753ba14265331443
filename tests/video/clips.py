"""Small H.264 clips of known content: frame k < 256 shows k as eight columns, black for 0 and white for 1."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def numbered(index: int, height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8 that says `index`, lowest bit on the left."""
    bits = (index >> np.arange(8)) & 1
    row = bits[np.arange(width) * 8 // width].astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def index_of(rgb_HW3: np.ndarray) -> int:
    """Which frame this is, at whatever size."""
    columns = np.array_split(rgb_HW3.mean((0, 2)), 8)
    return sum(1 << bit for bit, column in enumerate(columns) if column.mean() > 127)


def write_clip(
    path: Path,
    num_frames: int = 90,
    fps: Fraction | int = 30,
    size_px: tuple[int, int] = (64, 96),
    times_ms: Sequence[int] | None = None,
    bframes: int = 2,
    pictures: Sequence[np.ndarray] | np.ndarray | None = None,
    encoder: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Keyframe every 30 frames. `times_ms` instead of `fps` makes a file of variable rate; size is (height, width).
    `pictures`: as RGB [H, W, 3] or as 4:2:0 [H * 3 / 2, W], uint8."""
    height, width = size_px
    x264 = {"bf": str(bframes), "b_strategy": "0", "g": "30", "crf": "4", "sc_threshold": "0"}
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(encoder, rate=Fraction(fps), options=x264 if options is None else options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        time_base = Fraction(1, 1000) if times_ms else 1 / Fraction(fps)
        stream.codec_context.time_base = time_base
        num_frames = len(times_ms) if times_ms else num_frames if pictures is None else len(pictures)
        for k in range(num_frames):
            picture = numbered(k, height, width) if pictures is None else pictures[k]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.ndim == 3 else "yuv420p")
            frame.pts, frame.time_base = times_ms[k] if times_ms else k, time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def copy_packets(source: Path, target: Path, shift_s: float = 0.0, options: dict[str, str] | None = None) -> Path:
    """Remux without re-encoding, packets from the last keyframe at or before -shift_s on.

    A negative shift leaves packets with negative times, which the MP4 writer hides with an edit list, as
    `ffmpeg -ss ... -c copy` does.
    """
    with av.open(str(source)) as original, av.open(str(target), "w", options=options or {}) as out:
        video = original.streams.video[0]
        assert video.time_base is not None
        stream, shift = out.add_stream_from_template(video), round(shift_s / video.time_base)
        packets = [packet for packet in original.demux(video) if packet.size > 0]
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and (p.pts or 0) <= max(0, -shift)]
        for packet in packets[keys[-1] :]:
            assert packet.pts is not None and packet.dts is not None
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
            out.mux(packet)
    return target


def patch_matrix(source: Path, target: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write the display matrix (a b; c d) into the track header of an MP4."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def patch_edit_duration(source: Path, target: Path, duration_ms: int) -> Path:
    """Make the only edit of an MP4 show `duration_ms` of its media."""
    data = bytearray(source.read_bytes())
    at = data.find(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", duration_ms)
    target.write_bytes(data)
    return target


def insert_color_box(source: Path, target: Path, is_full_range: bool) -> Path:
    """Add a colr box (ISO 14496-12, 12.1.5: nclx, BT.601) to the H.264 track of an MP4 with its index at the end."""
    data = bytearray(source.read_bytes())
    box = struct.pack(">I4s4sHHHB", 19, b"colr", b"nclx", 6, 6, 6, 128 * is_full_range)
    start = data.find(b"moov")  # the brands in front name avc1 too
    sizes_at = [data.find(name, start) - 4 for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")]
    assert data.find(b"mdat") < sizes_at[0]
    end = sizes_at[-1] + int.from_bytes(data[sizes_at[-1] : sizes_at[-1] + 4], "big")
    for at in sizes_at:
        data[at : at + 4] = struct.pack(">I", int.from_bytes(data[at : at + 4], "big") + len(box))
    data[end:end] = box
    target.write_bytes(data)
    return target


def cut_in_half(source: Path, target: Path) -> Path:
    """Drop the second half of the frame data, keep the header in front of it."""
    data = source.read_bytes()
    start = data.find(b"mdat")
    target.write_bytes(data[: start + (len(data) - start) // 2])
    return target


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def black_png(side_px: int) -> bytes:
    """A square of one bit per pixel."""
    rows = zlib.compress(bytes((1 + side_px // 8) * side_px))
    head = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
