"""Every reader against a full sequential FFmpeg decode of the corpus: same frames, times, sizes and colours.

A file that a reader cannot get right must be refused. Which files those are is stated here one by one, so that a new
refusal, or a file that is suddenly let through, fails.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from tests.video import corpus, corpus_pairs
from tests.video.corpus import Clip
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.dali_pipeline import Device
from vcr1_fast.video.read import open_reader
from vcr1_fast.video.reader import Reader, UnsuitedError

# Matroska and WebM count milliseconds, the others count ticks that hold these rates exactly.
CLOCK_S = {"mkv": 1.1e-3, "webm": 1.1e-3}

# (mean, largest) difference from the sequential decode over a file, in levels of 255. One FFmpeg or another, the same
# conversion: 0. DALI interpolates chroma, which FFmpeg's fast path repeats: 4.8 and 117 on these hard edges, 5.2 and
# 123 where the reader turns BT.601 into BT.709 afterwards.
DIFFERENCE = {"pyav": (0.0, 0), "decord": (0.0, 0), "torchcodec": (0.0, 0), "dali": (5.5, 130)}
# FFmpeg leaves its fast path for odd sizes and 10 bits, and what takes over depends on version and caller: other
# colours along edges, up to one pixel of another bar.
DIFFERENCE_ODD = {"pyav": (0.0, 0), "decord": (4.6, 230), "torchcodec": (3.2, 110), "dali": DIFFERENCE["dali"]}
DIFFERENCE_OF = {
    ("decord", "h264-10-bit.mp4"): (4.6, 120),
    ("torchcodec", "h264-10-bit.mp4"): (4.3, 110),
}

# (mean, largest) levels by which the middle of a bar may be off its paint: 8-bit luma and chroma are half a level off
# each, times up to 3, then the codec. Measured mean 1.3 and largest 4; torchcodec 2.7 and 8.6 at odd sizes; DALI 1.3
# and 14 in BT.709, where it clips what the matrix applied afterwards needs. Wrong matrix or range: mean 9 and more.
PAINT = {"pyav": (1.5, 5), "decord": (1.5, 5), "torchcodec": (3.0, 9), "dali": (1.5, 15)}
PAINT["torchcodec_cuda"] = PAINT["dali"]  # not tried yet


CLIPS = (*corpus.CLIPS, *corpus_pairs.CLIPS)


def files(*endings: str) -> list[str]:
    return [clip.name for clip in CLIPS if clip.name.endswith(endings)]


# reader -> file -> why it is refused
REFUSED: dict[str, dict[str, str]] = {
    "pyav": {},
    "decord": {
        **dict.fromkeys(files(".avi", ".ts"), "is not an MP4, MOV, Matroska or WebM file"),
        **dict.fromkeys([clip.name for clip in CLIPS if clip.codec == "av1"], "cannot find video stream"),
        **dict.fromkeys(files("edit-start.mp4", "edit-start.mov", "edit-end.mp4"), "are shown (an edit list?)"),
        **dict.fromkeys(files("live.mkv", "live.webm"), "Failed to measure duration/frame-count"),
    },
    "torchcodec": {
        **dict.fromkeys(files(".avi"), "its packets do not say when their frames are shown"),
        **dict.fromkeys(files(".ts"), "torchcodec gives the frame of"),
        # read as limited, 13 levels off on average, where the pixel format has no name of its own for it
        **dict.fromkeys(
            [clip.name for clip in CLIPS if clip.is_full_range and clip.codec in ("vp9", "av1", "mpeg4")], "full range"
        ),
    },
    "dali": {
        clip.name: f"its codec is {clip.codec}, wanted one of vp8, vp9, mjpeg"
        for clip in CLIPS
        if clip.codec not in ("vp8", "vp9", "mjpeg")
    },
}

each_clip = pytest.mark.parametrize("clip", CLIPS, ids=[clip.name for clip in CLIPS])


def open_by_name(name: str, device: Device = "cpu") -> Reader:
    if name == "dali":
        from vcr1_fast.video.dali_reader import DaliReader

        return DaliReader(VideoConfig(), device)
    return open_reader(VideoConfig(reader=name))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    for clip in CLIPS:
        corpus.write(clip, made)
    return made


@pytest.fixture(scope="module", params=list(REFUSED))
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    try:
        opened = open_by_name(request.param)
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    assert opened.name.split()[0] == request.param
    yield opened
    opened.close()


def to_rgb(frame: av.VideoFrame, matrix: Colorspace, color_range: ColorRange) -> np.ndarray:
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=Colorspace.ITU601,  # of no effect on RGB
        src_color_range=color_range,
        dst_color_range=ColorRange.JPEG,
    )
    return np.rot90(rgb.to_ndarray(), frame.rotation // 90)


@functools.cache
def sequential_decode(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """All frames upright, in the colours the file declares, and their times from the first, from end to end."""
    pictures, times_s = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            matrix = Colorspace.ITU709 if frame.colorspace == 1 else Colorspace.ITU601
            is_full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
            pictures.append(to_rgb(frame, matrix, ColorRange.JPEG if is_full else ColorRange.MPEG))
            assert frame.time is not None
            times_s.append(frame.time)
    # AVI stores no presentation times, and FFmpeg's guesses for H.264 come in another order than the frames.
    return pictures, np.sort(times_s) - min(times_s)


def check_pictures(pictures: Sequence[np.ndarray], clip: Clip, by: str) -> None:
    """The right frames, the right way up, in the right colours."""
    assert {rgb.shape for rgb in pictures} == {(*clip.displayed_px, 3)}
    assert [corpus.index_of(corpus.as_stored(rgb, clip)) for rgb in pictures] == clip.shown_indices
    errors = np.abs([corpus.bars_of(corpus.as_stored(rgb, clip)) - corpus.BARS_83 for rgb in pictures])
    max_mean, max_largest = PAINT[by]
    assert errors.mean() <= max_mean and errors.max() <= max_largest


def check_times(times_s: np.ndarray, clip: Clip) -> None:
    assert times_s == pytest.approx(clip.times_s, abs=CLOCK_S.get(clip.suffix, 1e-5))


@each_clip
def test_reader_equals_the_sequential_decode(folder: Path, reader: Reader, clip: Clip) -> None:
    path, name = folder / clip.name, reader.name.split()[0]
    if clip.name in REFUSED[name]:
        kind = SampleError if name == "decord" else UnsuitedError  # what "+pyav" reads with PyAV
        with pytest.raises(kind, match=re.escape(REFUSED[name][clip.name])):
            list(reader.read(reader.probe(str(path)), [0]))
        return
    is_odd = clip.pix_fmt != "yuv444p" and any(side % 2 for side in clip.size_px)
    usual = (DIFFERENCE_ODD if is_odd else DIFFERENCE)[name]
    check_reader(reader, path, clip, *DIFFERENCE_OF.get((name, clip.name), usual))


def check_reader(reader: Reader, path: Path, clip: Clip, max_mean: float, max_largest: int) -> None:
    probe = reader.probe(str(path))
    check_times(probe.times_s, clip)
    last_interval_s = clip.times_s[-1] - clip.times_s[-2]
    assert probe.duration_s - probe.times_s[-1] == pytest.approx(last_interval_s, rel=2, abs=2e-3)
    assert (probe.height_px, probe.width_px) == clip.displayed_px
    wanted, _ = sequential_decode(path)
    got = list(reader.read(probe, range(len(wanted))))
    check_pictures(got, clip, by=reader.name.split()[0])
    difference = np.abs(np.stack(got).astype(np.int16) - np.stack(wanted))
    assert difference.mean() <= max_mean and difference.max() <= max_largest
    some = [1, 2, 2, len(wanted) - 1]
    for rgb, index in zip(reader.read(probe, some), some, strict=True):
        assert np.array_equal(rgb, got[index])


@pytest.fixture(scope="module", params=["dali", "torchcodec_cuda"])
def nvdec(request: pytest.FixtureRequest) -> Iterator[Reader]:
    try:
        opened = open_by_name(request.param, "gpu")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.mark.gpu
@each_clip
def test_nvdec_equals_the_sequential_decode_or_refuses(tmp_path: Path, nvdec: Reader, clip: Clip) -> None:
    large = corpus.enlarged(clip)
    path = corpus.write(large, tmp_path)
    try:
        nvdec.probe(str(path))
    except UnsuitedError as refusal:
        assert "set video.reader to pyav" in refusal.reason
        pytest.skip(refusal.reason)
    check_reader(nvdec, path, large, *DIFFERENCE["dali"])


def test_every_two_properties_meet_in_a_clip() -> None:
    wanted = set[tuple[int, str, int, str]]().union(*(one.pairs() for one in corpus_pairs.all_properties()))
    met = set[tuple[int, str, int, str]]().union(*(one.pairs() for one in corpus_pairs.PROPERTIES))
    assert len(wanted) > 300 and met == wanted
