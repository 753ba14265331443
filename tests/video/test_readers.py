"""All readers on real files: which frames, which way up, and one clear reason for each kind of broken file."""

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import torch

from bench.decode_sources import Scene
from tests.video import clips
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import torchcodec_reader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import EitherReader, open_reader, read_frames
from vcr1_fast.video.reader import Reader

CONFIG = VideoConfig()


READERS: list[Literal["pyav", "decord", "torchcodec"]] = ["pyav", "decord"]
if torchcodec_reader.unavailable_reason() is None:
    READERS.append("torchcodec")


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    opened = open_reader(VideoConfig(reader=request.param))
    yield opened
    opened.close()


def shown_indices(reader: Reader, path: Path) -> list[int]:
    """Read every frame and tell from its grey which one it is."""
    probe = reader.probe(str(path))
    return [clips.index_of(rgb) for rgb in reader.read(probe, range(len(probe.times_s)))]


def test_frames_of_a_plain_clip(tmp_path: Path, reader: Reader) -> None:
    path = clips.write_clip(tmp_path / "a b:c.mp4", num_frames=90, fps=30)
    frames = read_frames(str(path), CONFIG, reader)
    # 3 s at 2 fps: 6 frames, 89 / 5 = 17.8 apart; 64 x 96 px grows to 4 x 5 blocks
    assert frames.rgb_FHW3.shape == (6, 112, 140, 3) and frames.rgb_FHW3.dtype == torch.uint8
    assert frames.times_s.tolist() == pytest.approx([0, 18 / 30, 36 / 30, 53 / 30, 71 / 30, 89 / 30])
    assert frames.times_s.dtype == torch.float64
    assert [clips.index_of(rgb) for rgb in frames.rgb_FHW3.numpy()] == [0, 18, 36, 53, 71, 89]
    assert frames.sampled_fps == 2.0 and frames.duration_s == pytest.approx(3.0)
    assert frames.reader == reader.name and reader.name.split()[0] in READERS


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("bframes", [0, 3])
def test_every_frame_in_presentation_order(tmp_path: Path, reader: Reader, suffix: str, bframes: int) -> None:
    path = clips.write_clip(tmp_path / f"clip.{suffix}", num_frames=72, fps=24, bframes=bframes)
    assert shown_indices(reader, path) == list(range(72))
    assert read_frames(str(path), CONFIG, reader).sampled_fps == 2.0  # Matroska's milliseconds notwithstanding


def test_repeated_frames(tmp_path: Path, reader: Reader) -> None:
    path = clips.write_clip(tmp_path / "one.mp4", num_frames=1)
    frames = read_frames(str(path), CONFIG, reader)
    assert frames.rgb_FHW3.shape[0] == 2 and torch.equal(frames.rgb_FHW3[0], frames.rgb_FHW3[1])
    assert frames.sampled_fps == pytest.approx(60.0)  # 2 frames in 1/30 s


def test_variable_rate_is_sampled_in_time(tmp_path: Path, reader: Reader) -> None:
    # One frame a second for 4 s, then 41 frames 25 ms apart, up to 5 s
    times_ms = [0, 1000, 2000, 3000, *range(4000, 5001, 25)]
    path = clips.write_clip(tmp_path / "vfr.mp4", times_ms=times_ms)
    frames = read_frames(str(path), VideoConfig(fps=1.0, min_frames=2), reader)
    # 45 frames, D = 5 * 45 / 44 = 5.11 s, 4 frames when even: 0, 1.667, 3.333, 5 s
    assert frames.times_s.tolist() == pytest.approx([0.0, 2.0, 3.0, 5.0])
    assert [clips.index_of(rgb) for rgb in frames.rgb_FHW3.numpy()] == [0, 2, 3, 44]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, -1)),  # a phone held upright: clockwise
        ((-1, 0, 0, -1), lambda rgb: np.rot90(rgb, 2)),
        ((0, -1, 1, 0), lambda rgb: np.rot90(rgb, 1)),
    ],
)
def test_rotation(
    tmp_path: Path, reader: Reader, matrix: tuple[int, int, int, int], turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    picture = np.zeros((4, 64, 96, 3), np.uint8)
    picture[:, :32, :48, 0] = 250  # red only in the upper left quarter
    plain = clips.write_clip(tmp_path / "plain.mp4", num_frames=4, rgb_FHW3=picture)
    turned = clips.patch_matrix(plain, tmp_path / "turned.mp4", *matrix)
    [upright] = reader.read(reader.probe(str(plain)), [0])
    probe = reader.probe(str(turned))
    [got] = reader.read(probe, [0])
    assert upright[:24, :40, 0].min() > 200 and upright[40:, 56:, 0].max() < 50
    assert np.array_equal(got, turn(upright))
    assert (probe.height_px, probe.width_px) == got.shape[:2]


def test_mirrored_matrix(tmp_path: Path) -> None:
    """Upright in PyAV; the others only turn, and refuse it."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None] * 2, (2, 64, 96, 3)).copy()
    plain = clips.write_clip(tmp_path / "plain.mp4", num_frames=2, rgb_FHW3=ramp)
    mirrored = clips.patch_matrix(plain, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    reader = PyavReader()
    [straight], [got] = (list(reader.read(reader.probe(str(p)), [0])) for p in (plain, mirrored))
    assert np.array_equal(got, straight[:, ::-1])
    for name in READERS[1:]:
        other = open_reader(VideoConfig(reader=name))
        with pytest.raises(SampleError, match=r"shown mirrored or slanted, .* set video\.reader to pyav"):
            other.probe(str(mirrored))
        other.close()


def test_edit_list_at_the_start(tmp_path: Path, reader: Reader) -> None:
    plain = clips.write_clip(tmp_path / "plain.mp4", num_frames=90, fps=30)
    # Cut at 1.5 s: packets start at the keyframe of 1 s, frames 30..44 are there and hidden
    cut = clips.copy_packets(plain, tmp_path / "cut.mp4", shift_s=-1.5)
    assert b"elst" in cut.read_bytes()
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 60
    if reader.name.startswith("decord"):
        with pytest.raises(SampleError, match=r"sees 60 frames .* where 45 .* are shown"):
            reader.probe(str(cut))
        return
    assert shown_indices(reader, cut) == list(range(45, 90))
    probe = reader.probe(str(cut))
    assert probe.times_s.tolist() == pytest.approx([k / 30 for k in range(45)])
    assert probe.duration_s == pytest.approx(1.5)


def test_edit_list_at_the_end(tmp_path: Path, reader: Reader) -> None:
    plain = clips.write_clip(tmp_path / "plain.mp4", num_frames=90, fps=30)
    cut = clips.patch_edit_duration(plain, tmp_path / "cut.mp4", 1500)
    if reader.name.startswith("decord"):
        with pytest.raises(SampleError, match=r"set video\.reader to pyav"):
            reader.probe(str(cut))
        return
    assert shown_indices(reader, cut) == list(range(45))


@pytest.mark.parametrize("suffix", ["avi", "ts"])
def test_containers_others_get_wrong(tmp_path: Path, reader: Reader, suffix: str) -> None:
    """decord: see DecordReader.probe. torchcodec starts MPEG-TS at its second keyframe and finds no times in AVI."""
    path = clips.write_clip(tmp_path / f"clip.{suffix}", num_frames=72, fps=24)
    if not reader.name.startswith("pyav"):
        with pytest.raises(SampleError, match=r"set video\.reader to pyav"):
            shown_indices(reader, path)
        return
    assert shown_indices(reader, path) == list(range(72))
    assert read_frames(str(path), CONFIG, reader).sampled_fps == 2.0


def test_a_late_start_counts_from_the_first_frame(tmp_path: Path, reader: Reader) -> None:
    plain = clips.write_clip(tmp_path / "plain.mp4", num_frames=60)
    for suffix in ("mp4", "mkv"):
        late = clips.copy_packets(plain, tmp_path / f"late.{suffix}", shift_s=2.0)
        assert shown_indices(reader, late) == list(range(60))
        probe = reader.probe(str(late))
        assert probe.times_s[0] == 0.0 and probe.duration_s == pytest.approx(2.0, abs=2e-3)


def test_both_readers_give_the_same_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 120, 160, 3)).astype(np.uint8)
    path = str(clips.write_clip(tmp_path / "noise.mp4", size_px=(120, 160), num_frames=40, rgb_FHW3=noise))
    results = []
    for name in ("pyav", "decord"):
        opened = open_reader(VideoConfig(reader=name))
        probe = opened.probe(path)
        results.append((np.stack(list(opened.read(probe, range(40)))), read_frames(path, CONFIG, opened)))
        opened.close()
    (rgb, frames), (decord_rgb, decord_frames) = results
    assert rgb.std() > 20 and np.array_equal(rgb, decord_rgb)
    assert torch.equal(frames.rgb_FHW3, decord_frames.rgb_FHW3)
    assert torch.equal(frames.times_s, decord_frames.times_s)


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_without_frames(path: Path) -> Path:
    """A Matroska file whose header promises a video track, and nothing after the header."""
    whole = clips.write_clip(path, num_frames=30).read_bytes()
    path.write_bytes(whole[: whole.find(b"\x1f\x43\xb6\x75")])  # the id of the first cluster
    return path


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    plain = clips.write_clip(folder / "plain.mp4", num_frames=90)
    fast = clips.copy_packets(plain, folder / "fast.mp4", options={"movflags": "+faststart"})
    matroska = clips.write_clip(folder / "plain.mkv", num_frames=90)
    for name, content in {
        "text.mp4": b"not a video\n" * 50,
        "empty.mp4": b"",
        "list.mp4": b"ffconcat version 1.0\n",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "headless.mp4").write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    (folder / "short.mkv").write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    damaged = bytearray(fast.read_bytes())
    middle = (damaged.find(b"mdat") + len(damaged)) // 2
    damaged[middle : middle + 200] = bytes(range(7, 207))
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "folder.mp4").mkdir()
    return {
        "missing": (folder / "nowhere.mp4", "no such file"),
        "nul": (folder / "a\0b.mp4", "cannot be opened|no such file"),
        "empty": (folder / "empty.mp4", "empty"),
        "directory": (folder / "folder.mp4", "holds no image"),
        "text": (folder / "text.mp4", "not a video file"),
        "playlist": (folder / "list.mp4", "not a video file|no video track|not an MP4|cannot be decoded"),
        "audio": (write_audio(folder / "audio.mp4"), "no video track"),
        "no frames": (write_without_frames(folder / "none.mkv"), "not one frame|not a video file|cannot be decoded"),
        "header lost": (folder / "headless.mp4", "not a video file"),
        "cut mp4": (clips.cut_in_half(fast, folder / "cut.mp4"), "missing or damaged|damaged or cut short"),
        "cut mkv": (folder / "short.mkv", r"cut short: its header says 3.00 s"),
        "damaged": (folder / "damaged.mp4", "damaged or cut short|(decord|torchcodec) cannot decode"),
    }


def test_each_kind_of_broken_file_gives_one_clear_reason(tmp_path: Path, reader: Reader) -> None:
    for kind, (path, reason) in broken_files(tmp_path).items():
        with pytest.raises(SampleError, match=reason) as caught:
            read_frames(str(path), CONFIG, reader)
        assert caught.value.source == str(path), kind
        assert "\n" not in caught.value.reason and len(caught.value.reason) < 300, kind
    good = clips.write_clip(tmp_path / "good.mp4", num_frames=30)
    assert len(read_frames(str(good), CONFIG, reader).times_s) == 4  # and the reader goes on


def test_frames_built_on_a_damaged_one_are_refused(tmp_path: Path) -> None:
    """FFmpeg flags frame 40 only; 41 to 59 refer to it, and 60 is the next keyframe."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 64, 96, 3)).astype(np.uint8)
    path = clips.write_clip(tmp_path / "a.mp4", num_frames=90, bframes=0, rgb_FHW3=noise)
    reader = PyavReader()
    whole = list(reader.read(reader.probe(str(path)), range(90)))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size > 0][40]
        assert packet.pos is not None and packet.size > 2000
        data = bytearray(path.read_bytes())
        middle, end = packet.pos + packet.size // 2, packet.pos + packet.size
    data[middle:end] = bytes(end - middle)
    path.write_bytes(data)
    probe = reader.probe(str(path))
    for index in (39, 60, 89):
        [got] = reader.read(probe, [index])
        assert np.array_equal(got, whole[index])
    for index in (40, 41, 59):
        with pytest.raises(SampleError, match="is damaged"):
            list(reader.read(probe, [index]))


@pytest.mark.parametrize("suffix", ["webm", "mp4"])
def test_odd_sizes(tmp_path: Path, reader: Reader, suffix: str) -> None:
    """4:2:0 with an odd width and height, which only VP9 stores."""
    path, height, width = tmp_path / f"odd.{suffix}", 65, 97
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx-vp9", rate=10, options={"cpu-used": "8", "deadline": "realtime", "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(clips.numbered(k, height, width), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    probe = reader.probe(str(path))
    assert (probe.height_px, probe.width_px) == (height, width) and probe.duration_s == pytest.approx(1.2, abs=1e-3)
    rgb_FHW3 = np.stack(list(reader.read(probe, range(12))))
    assert rgb_FHW3.shape == (12, height, width, 3)
    assert [clips.index_of(rgb) for rgb in rgb_FHW3] == list(range(12))


def test_a_raw_stream_runs_at_the_rate_in_it(tmp_path: Path) -> None:
    """No packet carries a time; FFmpeg's own guess before it looks inside is 25 a second."""
    path = clips.write_clip(tmp_path / "a.h264", num_frames=60, fps=30)
    for name in READERS:
        opened = open_reader(VideoConfig(reader=name))
        if name != "pyav":
            with pytest.raises(SampleError, match=r"set video\.reader to pyav"):
                opened.probe(str(path))
        else:
            assert opened.probe(str(path)).duration_s == pytest.approx(2.0)
            assert shown_indices(opened, path) == list(range(60))
        opened.close()


def test_each_file_has_one_of_two_readers(tmp_path: Path) -> None:
    class Matroska(PyavReader):
        name = "matroska only"
        num_read = 0

        def takes(self, path: str) -> bool:
            return path.endswith(".mkv")

        def read(self, probe, frame_indices):  # type: ignore[no-untyped-def]
            self.num_read += 1
            return super().read(probe, frame_indices)

    first = Matroska()
    either = EitherReader(first, PyavReader())
    assert either.name == f"matroska only, others {PyavReader.name}"
    for suffix, num_read in (("mkv", 1), ("mp4", 1)):
        path = clips.write_clip(tmp_path / f"a.{suffix}", num_frames=6)
        frames = read_frames(str(path), CONFIG, either)
        assert frames.reader == either.name and first.num_read == num_read
        assert [clips.index_of(rgb) for rgb in frames.rgb_FHW3.numpy()] == [0, 2, 3, 5]


def test_frames_too_thin_for_the_model_are_a_sample_error(tmp_path: Path, reader: Reader) -> None:
    path = clips.write_clip(tmp_path / "thin.mp4", num_frames=4, size_px=(2, 402))
    with pytest.raises(SampleError, match="factor of 200"):
        read_frames(str(path), CONFIG, reader)


def test_an_unreadable_last_frame_is_never_replaced(tmp_path: Path) -> None:
    """A reader that gives too few frames must not leave uninitialised memory in the result."""

    class Short(PyavReader):
        def read(self, probe, frame_indices):  # type: ignore[no-untyped-def]
            yield from list(super().read(probe, frame_indices))[:-1]

    path = clips.write_clip(tmp_path / "a.mp4", num_frames=60)
    with pytest.raises(SampleError, match="gave 3 frames, wanted 4"):
        read_frames(str(path), CONFIG, Short())


def test_damage_inside_a_packet_of_h264_without_cabac(tmp_path: Path) -> None:
    """16 bytes of frame 8 overwritten, at 16 places: FFmpeg as it comes repairs 7 of these without a word."""
    path, scene = tmp_path / "a.mp4", Scene(160, 96)
    options = {"x264-params": "cabac=0:bframes=0:threads=1", "crf": "22", "preset": "veryfast"}
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(scene.yuv420(k), format="yuv420p")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size > 0][8]
        start, size = packet.pos, packet.size
    sound, reader = path.read_bytes(), PyavReader()
    assert start is not None and size > 200
    num_flagged = num_refused = 0
    for place in range(16):
        at = start + 16 + (size - 40) * place // 16
        path.write_bytes(sound[:at] + bytes((7 * k + 13 * place) & 255 for k in range(16)) + sound[at + 16 :])
        with av.open(str(path)) as container:
            num_flagged += any(frame.is_corrupt for frame in container.decode(video=0))
        with contextlib.suppress(SampleError):
            list(reader.read(reader.probe(str(path)), [8]))
            continue
        num_refused += 1
    assert num_refused >= 15 and num_flagged <= 12
