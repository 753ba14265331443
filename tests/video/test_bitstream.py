"""Damage that shows in packets: real packets of every codec pass, each kind of damage is named."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from tests.video import corpus
from tests.video.corpus import Clip
from vcr1_fast.video.bitstream import HOLE, BitstreamCheck


def packets_and_check(
    folder: Path, codec: str, suffix: str, size_px: tuple[int, int] = (64, 64)
) -> tuple[BitstreamCheck, list[bytes]]:
    is_mjpeg = codec == "mjpeg"
    pix_fmt = "yuvj420p" if is_mjpeg else "yuv420p"
    clip = Clip(f"{codec}.{suffix}", codec, suffix, size_px=size_px, pix_fmt=pix_fmt, is_full_range=is_mjpeg)
    with av.open(str(corpus.write(clip, folder))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size > 0]
        return BitstreamCheck(context.codec.canonical_name, context.extradata), packets


CODECS = [
    ("h264", "mp4"),
    ("h264", "ts"),
    ("hevc", "mkv"),
    ("vp8", "webm"),
    ("vp9", "mp4"),
    ("av1", "mp4"),
    ("mpeg4", "avi"),
    ("mjpeg", "avi"),
]


@pytest.mark.parametrize(("codec", "suffix"), CODECS)
def test_sound_packets_pass_and_holes_do_not(tmp_path: Path, codec: str, suffix: str) -> None:
    check, packets = packets_and_check(tmp_path, codec, suffix)
    assert len(packets) == corpus.NUM_FRAMES and [check.damage(packet) for packet in packets] == [None] * len(packets)
    if codec != "mjpeg":  # flat grey is all zeros there
        middle = len(packets[0]) // 2
        assert check.damage(packets[0][:middle] + HOLE + packets[0][middle:]) is not None
    assert check.damage(b"") is None  # the end of the stream


@pytest.mark.parametrize(
    ("codec", "suffix", "message"),
    [
        ("h264", "mp4", "longer than its packet|valid header"),
        ("hevc", "mkv", "longer than its packet|valid header"),
        ("vp8", "webm", "cut short|start code"),
        ("vp9", "mp4", "frame marker"),
        ("av1", "mp4", "valid header"),
        ("mjpeg", "avi", "without start"),
    ],
)
def test_an_overwritten_start_is_found(tmp_path: Path, codec: str, suffix: str, message: str) -> None:
    check, packets = packets_and_check(tmp_path, codec, suffix)
    for fill in (b"\x00", b"\xff", b"\x55"):
        assert check.damage(fill * 24 + packets[0][24:]) is not None, fill
    damage = check.damage(b"\xff" * 24 + packets[0][24:])
    assert damage is not None and any(part in damage for part in message.split("|"))


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "mp4"), ("hevc", "mkv"), ("vp8", "webm"), ("av1", "mp4")])
def test_a_packet_that_is_cut_is_found(tmp_path: Path, codec: str, suffix: str) -> None:
    check, packets = packets_and_check(tmp_path, codec, suffix)
    kept = 12 if codec == "vp8" else len(packets[0]) - 8
    assert check.damage(packets[0][:kept]) is not None


def test_start_codes_inside_a_slice_are_found() -> None:
    """01 65: a version-1 header with 4-byte lengths, then an IDR slice (type 5)."""
    check = BitstreamCheck("h264", b"\x01\x64\x00\x1f\xff\xe0\x00")
    unit = b"\x65" + bytes(range(1, 40))
    assert check.damage(len(unit).to_bytes(4, "big") + unit) is None
    for forbidden in (b"\0\0\0", b"\0\0\1", b"\0\0\2"):
        broken = unit[:9] + forbidden + unit[12:]
        assert check.damage(len(broken).to_bytes(4, "big") + broken) == "holds bytes that no encoder writes"
    allowed = unit[:9] + b"\0\0\3" + unit[12:]
    assert check.damage(len(allowed).to_bytes(4, "big") + allowed) is None


@pytest.mark.parametrize(("codec", "suffix"), [("vp8", "webm"), ("vp9", "mp4"), ("h264", "mp4")])
def test_a_change_of_size_is_found(tmp_path: Path, codec: str, suffix: str) -> None:
    check, small = packets_and_check(tmp_path, codec, suffix, (48, 64))
    other_check, large = packets_and_check(tmp_path, codec, suffix, (64, 96))
    if codec == "h264":  # MP4 keeps the sizes in its header; other muxers put them (type 7) in the packets
        small, large = ([len(sps).to_bytes(4, "big") + sps] for sps in (b"\x67\x64\x00\x0a", b"\x67\x64\x00\x0b"))
    assert check.damage(small[0]) is None and other_check.damage(large[0]) is None
    changed = check.damage(large[0])
    assert changed is not None and changed.startswith("changes its picture")
