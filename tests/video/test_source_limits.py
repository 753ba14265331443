"""Files that ask for more than they should: huge pictures, endless playlists, absurd numbers of frames."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.video import clips
from tests.video.test_readers import READERS
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.types import SampleError
from vcr1_fast.video import pyav_reader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import open_reader, read_frames


@pytest.mark.parametrize("reader_name", READERS)
def test_frames_above_the_limit_are_refused_by_name(tmp_path: Path, reader_name: ReaderName):
    for suffix in ("mp4", "mkv"):
        path = str(clips.write_clip(tmp_path / f"a.{suffix}", num_frames=8))
        exact = open_reader(VideoConfig(reader=reader_name, max_source_pixels=64 * 96))
        assert len(read_frames(path, VideoConfig(), exact).times_s) == 4
        exact.close()
        small = open_reader(VideoConfig(reader=reader_name, max_source_pixels=64 * 96 - 1))
        with pytest.raises(
            SampleError, match=r"frames of 96 x 64 px, more than video\.max_source_pixels \(6143\); shrink it, or raise"
        ):
            small.probe(path)
        small.close()


@pytest.mark.parametrize("reader_name", READERS)
def test_an_image_bomb_under_the_name_of_a_video(tmp_path: Path, reader_name: ReaderName):
    """31 KB that are 256 million pixels, 768 MB as RGB."""
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.black_png(16_000))
    reader = open_reader(VideoConfig(reader=reader_name))
    with pytest.raises(SampleError, match=r"16000 x 16000 px, more than video\.max_source_pixels"):
        reader.probe(str(path))
    reader.close()


@pytest.mark.parametrize("suffix", ["mov", "avi", "nut"])
def test_a_container_that_says_less_than_its_frames_have(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gray"
        for k in range(2):
            packet = av.Packet(clips.black_png(1_000))
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, k, k, True
            packet.time_base = Fraction(1, 30)
            out.mux(packet)
    with pytest.raises(SampleError, match=r"damaged or has frames above video\.max_source_pixels"):
        PyavReader(max_source_pixels=10_000).probe(str(path))
    generous = PyavReader().probe(str(path))  # it is the limit that refused it
    assert (generous.width_px, generous.height_px) == (1_000, 1_000)


@pytest.mark.parametrize("name", ["live.m3u8", "live.mp4", "list.ffconcat"])
def test_playlists_are_refused_at_once(tmp_path: Path, name: str):
    """FFmpeg waits for ever for the next line of a live playlist, and frames of another file are not those of this."""
    clips.write_clip(tmp_path / "part.ts", num_frames=8)
    live = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:5.0,\npart.ts\n"
    (tmp_path / name).write_text("ffconcat version 1.0\nfile part.ts\n" if name.endswith("concat") else live)
    started = time.monotonic()
    with pytest.raises(SampleError, match="is not a video file FFmpeg can open"):
        PyavReader().probe(str(tmp_path / name))
    assert time.monotonic() - started < 5


def test_a_number_of_frames_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=60))
    monkeypatch.setattr(pyav_reader, "MAX_FRAMES", 60)
    assert len(PyavReader().probe(path).times_s) == 60
    monkeypatch.setattr(pyav_reader, "MAX_FRAMES", 59)
    with pytest.raises(SampleError, match="has more than 59 frames; cut it into parts"):
        PyavReader().probe(path)
