"""Parts of files: FFmpeg decodes the frames of a part to the bits that it decodes them to in the whole file."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from tests.video import clips
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import dali_codecs
from vcr1_fast.video.dali_cut import Cut, Entries, copy_of
from vcr1_fast.video.dali_reader import DaliReader
from vcr1_fast.video.dali_track import Track, inspect
from vcr1_fast.video.pyav_reader import PyavReader

NUM_FRAMES, KEY_EVERY = 60, 20
X264 = {"g": str(KEY_EVERY), "preset": "ultrafast", "bf": "3", "b_strategy": "0"}
ALL = tuple(range(0, NUM_FRAMES, KEY_EVERY))
FILES = {  # name -> encoder, its options, frames at which decoding may begin
    "h264.mp4": ("libx264", X264 | {"sc_threshold": "0"}, ALL),
    "h264.mkv": ("libx264", X264 | {"sc_threshold": "0", "x264-params": "b-pyramid=normal"}, ALL),
    "h264-open.mp4": ("libx264", X264 | {"sc_threshold": "0", "x264-params": "open-gop=1"}, (0,)),
    "h264-refresh.mkv": ("libx264", X264 | {"x264-params": "intra-refresh=1"}, (0,)),
    "hevc-open.mp4": ("libx265", X264 | {"x265-params": "log-level=none:open-gop=1:scenecut=0"}, ALL),
    "hevc-closed.mkv": ("libx265", X264 | {"x265-params": "log-level=none:open-gop=0:scenecut=0"}, ALL),
    "vp8.webm": ("libvpx", {"g": "20", "lag-in-frames": "12", "auto-alt-ref": "1", "b": "300k"}, None),
    "vp9.mp4": ("libvpx-vp9", {"g": "20", "lag-in-frames": "12", "auto-alt-ref": "1", "cpu-used": "8"}, ALL),
    "av1.mkv": ("libsvtav1", {"preset": "12", "svtav1-params": "keyint=20"}, None),
    "mpeg4-open.mp4": ("mpeg4", {"bf": "2", "g": "20", "q": "2"}, (0,)),
    "mjpeg.mkv": ("mjpeg", {"q": "2"}, tuple(range(NUM_FRAMES))),
}  # None: where the encoder puts them


def decoded(source: str | io.BytesIO) -> list[np.ndarray]:
    with av.open(source) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def cut_of(track: Track, indices: list[int]) -> Cut | None:
    assert track.entries is not None and track.probe.ticks is not None
    return track.entries.cut(track.probe.ticks[indices])


@pytest.mark.parametrize("name", FILES)
def test_a_part_holds_the_same_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    encoder, options, begins = FILES[name]
    path, pyav = str(clips.write_clip(tmp_path / name, NUM_FRAMES, 24, encoder=encoder, options=options)), PyavReader()
    track, whole = inspect(path, pyav), decoded(path)
    assert len(whole) == NUM_FRAMES and track.entries is not None and track.probe.ticks is not None
    found = np.searchsorted(track.probe.ticks, track.entries.ticks_P[track.entries.places_E]).tolist()
    assert found == [*begins] if begins is not None else len(found) > 1
    for wanted in ([59], [25], [KEY_EVERY], [21, 38, 39], [45, 46, 58]):
        cut = cut_of(track, wanted)
        if wanted[0] < min([*found[1:], NUM_FRAMES]):
            assert cut is None
            continue
        assert cut is not None
        with pyav.open(path) as (container, stream):
            encoded = copy_of(cut, container, stream)
        frames = decoded(io.BytesIO(encoded.tobytes()))
        begin = max(index for index in found if index <= wanted[0])
        assert len(frames) == len(cut.ticks_C) <= wanted[-1] + 3 - begin  # of B-frames behind it none, or two before it
        for index, place in zip(wanted, cut.indices_F, strict=True):
            assert np.array_equal(frames[place], whole[index]), (wanted, index)


def test_cuts_by_hand() -> None:
    """Shown at     0  40  10  20  30 | 80  60  50  70 | 90, keyframes at 0, 80 and 90; 50 to 70 lead the second."""
    ticks_P = np.array([0, 40, 10, 20, 30, 80, 60, 50, 70, 90])
    some = Entries(ticks_P, np.array([0, 5, 9]))
    for wanted, ticks, indices in (
        ([80], [80], [0]),
        ([80, 90], [80, 90], [0, 1]),  # without the leading ones
        ([90], [90], [0]),
    ):
        cut = some.cut(np.array(wanted))
        assert cut is not None and (cut.ticks_C.tolist(), cut.indices_F.tolist()) == (ticks, indices)
    for wanted in ([0], [30], [70], [70, 90]):
        assert some.cut(np.array(wanted)) is None
    late = Entries(ticks_P, np.array([1])).cut(np.array([50, 60]))
    assert late is not None and late.ticks_C.tolist() == [40, 80, 60, 50] and late.indices_F.tolist() == [1, 2]


def test_where_times_do_not_name_packets_nothing_is_cut(tmp_path: Path) -> None:
    mp4 = clips.write_clip(tmp_path / "a.mp4")
    assert inspect(str(mp4), PyavReader()).entries is not None
    for track in (
        inspect(str(clips.write_clip(tmp_path / "a.ts")), PyavReader()),
        inspect(str(clips.write_clip(tmp_path / "a.avi", bframes=0)), PyavReader()),
        inspect(str(clips.copy_packets(mp4, tmp_path / "trimmed.mp4", -1.5)), PyavReader()),  # an edit list hides some
        inspect(str(clips.write_clip(tmp_path / "fast.mp4", num_frames=20, fps=1000)), PyavReader()),
    ):
        assert track.entries is None, track.probe.path


def test_a_file_that_was_changed_after_it_was_probed(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "a.mp4")
    cut = cut_of(inspect(str(path), PyavReader()), [70])
    assert cut is not None and cut.ticks_C[0] > 0
    clips.write_clip(path, num_frames=50)
    reason = r"0 of \d+ packets are there: the file was changed"
    with pytest.raises(SampleError, match=reason), PyavReader().open(str(path)) as (container, stream):
        copy_of(cut, container, stream)


@pytest.mark.skipif(dali_codecs.version() is None, reason="DALI is not installed")
def test_dali_reads_the_part_that_is_wanted(tmp_path: Path) -> None:
    encoder, options, _ = FILES["vp9.mp4"]
    path = clips.write_clip(tmp_path / "a.mp4", NUM_FRAMES, 24, encoder=encoder, options=options)
    with contextlib.closing(DaliReader(VideoConfig(), "cpu")) as reader:
        probe = reader.probe(str(path))
        everything = list(reader.read(probe, range(NUM_FRAMES)))
        track = inspect(str(path), PyavReader())
        sizes = [len(reader._job(track, wanted, None).encoded_B) for wanted in ([0], [59])]
        assert sizes[0] == path.stat().st_size and sizes[1] < sizes[0] / 2
        for wanted in itertools.combinations((3, 19, 20, 41, 59), 2):
            got = list(reader.read(probe, [*wanted, wanted[-1]]))
            assert np.array_equal(got, [everything[index] for index in (*wanted, wanted[-1])])
