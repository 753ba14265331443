"""All readers on real files: frames chosen by time, and one clear reason for each kind of broken file.

Codecs, containers, turns, edit lists, sizes and colours are in test_parity.py.
"""

import contextlib
import hashlib
from collections.abc import Iterator
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
from vcr1_fast.video.image_folder_reader import ImageFolderReader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import SourceReader, open_reader, read_frames
from vcr1_fast.video.reader import Probe, Reader, UnsuitedError

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


def test_repeated_frames(tmp_path: Path, reader: Reader) -> None:
    path = clips.write_clip(tmp_path / "one.mp4", num_frames=1)
    frames = read_frames(str(path), CONFIG, reader)
    assert frames.rgb_FHW3.shape[0] == 2 and torch.equal(frames.rgb_FHW3[0], frames.rgb_FHW3[1])
    assert frames.sampled_fps == pytest.approx(60.0)  # 2 frames in 1/30 s


def test_mirrored_matrix(tmp_path: Path) -> None:
    """Upright in PyAV; the others only turn, and refuse it."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None] * 2, (2, 64, 96, 3)).copy()
    plain = clips.write_clip(tmp_path / "plain.mp4", pictures=ramp)
    mirrored = clips.patch_matrix(plain, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    reader = PyavReader()
    [straight], [got] = (list(reader.read(reader.probe(str(p)), [0])) for p in (plain, mirrored))
    assert np.array_equal(got, straight[:, ::-1])
    for name in READERS[1:]:
        other = open_reader(VideoConfig(reader=name))
        with pytest.raises(SampleError, match=r"shown mirrored or slanted, .* set video\.reader to pyav"):
            other.probe(str(mirrored))
        other.close()


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
    """Beside those of damaged.py."""
    plain = clips.write_clip(folder / "plain.mp4", num_frames=90)
    fast = clips.copy_packets(plain, folder / "fast.mp4", options={"movflags": "+faststart"})
    matroska = clips.write_clip(folder / "plain.mkv", num_frames=90)
    (folder / "list.mp4").write_bytes(b"ffconcat version 1.0\n")
    (folder / "short.mkv").write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    live = clips.copy_packets(plain, folder / "live.mkv", options={"live": "1"})
    (folder / "cut_live.mkv").write_bytes(live.read_bytes()[: live.stat().st_size * 7 // 10])
    webp = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\x37\0\0\x37\0\0"
    (folder / "animated.mp4").write_bytes(webp)
    damaged = bytearray(fast.read_bytes())
    middle = (damaged.find(b"mdat") + len(damaged)) // 2
    damaged[middle : middle + 200] = bytes(range(7, 207))
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "folder.mp4").mkdir()
    return {
        "nul": (folder / "a\0b.mp4", "cannot be opened|no such file"),
        "directory": (folder / "folder.mp4", "holds no image"),
        "playlist": (folder / "list.mp4", "not a video file|no video track|not an MP4|cannot be decoded"),
        "audio": (write_audio(folder / "audio.mp4"), "no video track"),
        "no frames": (write_without_frames(folder / "none.mkv"), "not one frame|not a video file|cannot be decoded"),
        "cut mp4": (clips.cut_in_half(fast, folder / "cut.mp4"), "missing or damaged|damaged or cut short"),
        "cut mkv": (folder / "short.mkv", r"cut short: its header says 3.00 s"),
        "cut live mkv": (folder / "cut_live.mkv", r"cut short: 1\.\d\d s can be shown, and its end is not whole"),
        "animated WebP": (folder / "animated.mp4", "animated WebP, which FFmpeg cannot decode: convert it|not an MP4"),
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


def test_a_live_recording_that_is_whole_is_read(tmp_path: Path) -> None:
    live = clips.copy_packets(clips.write_clip(tmp_path / "a.mp4"), tmp_path / "live.mkv", options={"live": "1"})
    assert len(PyavReader().probe(str(live)).times_s) == 90


def test_an_animated_avif_is_no_still_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    if not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("this PIL writes no AVIF")
    shades = [image.new("RGB", (64, 64), (40 * k,) * 3) for k in range(6)]
    shades[0].save(tmp_path / "a.avif", save_all=True, append_images=shades[1:], duration=250)
    reader = PyavReader()
    probe = reader.probe(str(tmp_path / "a.avif"))
    assert probe.times_s.tolist() == [0.25 * k for k in range(6)]
    assert [round(float(rgb.mean()) / 40) for rgb in reader.read(probe, range(6))] == [*range(6)]


def test_frames_built_on_a_damaged_one_are_refused(tmp_path: Path) -> None:
    """FFmpeg flags frame 40 only; 41 to 59 refer to it, and 60 is the next keyframe."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (90, 64, 96, 3)).astype(np.uint8)
    path = clips.write_clip(tmp_path / "a.mp4", bframes=0, pictures=noise)
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


def test_a_raw_stream_runs_at_the_rate_in_it(tmp_path: Path) -> None:
    """No packet carries a time; FFmpeg's own guess before it looks inside is 25 a second."""
    path, reader = clips.write_clip(tmp_path / "a.h264", num_frames=60, fps=30), PyavReader()
    assert reader.probe(str(path)).duration_s == pytest.approx(2.0)
    assert shown_indices(reader, path) == list(range(60))


def test_each_file_has_one_of_two_readers(tmp_path: Path) -> None:
    class Matroska(PyavReader):
        name = "matroska only"
        num_read = 0

        def probe(self, path: str, onlooker: object = None) -> Probe:
            if path.endswith(".mp4"):
                raise UnsuitedError(path, "is no Matroska file", super().probe(path))
            return super().probe(path)

        def read(self, probe, frame_indices):  # type: ignore[no-untyped-def]
            self.num_read += 1
            if "late" in probe.path:
                raise UnsuitedError(probe.path, "has other frames than it says")
            return super().read(probe, frame_indices)

    first = Matroska()
    either = SourceReader(first, ImageFolderReader(2.0), PyavReader())
    assert either.name == f"matroska only, others {PyavReader.name}, images {PyavReader.name}"
    for name, num_read in (("a.mkv", 1), ("a.mp4", 1), ("late.mkv", 2)):
        path = clips.write_clip(tmp_path / name, num_frames=6)
        frames = read_frames(str(path), CONFIG, either)
        assert frames.reader == either.name and first.num_read == num_read
        assert torch.equal(frames.rgb_FHW3, read_frames(str(path), CONFIG, PyavReader()).rgb_FHW3)
    for name in ("a.mp4", "late.mkv"):
        with pytest.raises(UnsuitedError):
            read_frames(str(tmp_path / name), CONFIG, SourceReader(first, ImageFolderReader(2.0)))
    (tmp_path / "empty.mkv").touch()
    with pytest.raises(SampleError, match="the file is empty"):  # no other reader is asked
        read_frames(str(tmp_path / "empty.mkv"), CONFIG, either)


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
    with pytest.raises(ValueError, match="shorter"):
        read_frames(str(path), CONFIG, Short())


def write_scene(path: Path, codec: str, options: dict[str, str]) -> Path:
    """12 frames of 160 x 96."""
    pictures = [Scene(160, 96).yuv420(k) for k in range(12)]
    return clips.write_clip(path, fps=25, size_px=(96, 160), pictures=pictures, encoder=codec, options=options)


def packet_places(path: Path) -> list[tuple[int, int]]:
    """(where it starts in the file, bytes) of each packet."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size > 0 and p.pos is not None]


def test_damage_inside_a_packet_of_h264_without_cabac(tmp_path: Path) -> None:
    """16 bytes of frame 8 overwritten, at 16 places: FFmpeg as it comes repairs 7 of these without a word."""
    options = {"x264-params": "cabac=0:bframes=0:threads=1", "crf": "22", "preset": "veryfast"}
    path = write_scene(tmp_path / "a.mp4", "libx264", options)
    [(start, size)] = packet_places(path)[8:9]
    sound, reader = path.read_bytes(), PyavReader()
    assert size > 200
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


def test_damage_in_mpeg4_is_seen_each_time_or_never(tmp_path: Path) -> None:
    """With threads FFmpeg decodes a frame while the one before is being repaired, and now and then flags neither."""
    path = write_scene(tmp_path / "a.avi", "mpeg4", {"g": "12", "threads": "1"})
    sound, reader = path.read_bytes(), PyavReader()

    def outcome() -> str:
        try:
            frames = reader.read(reader.probe(str(path)), range(12))
            return hashlib.sha256(b"".join(rgb.tobytes() for rgb in frames)).hexdigest()
        except SampleError as error:
            return error.reason

    for start, size in packet_places(path)[2:8]:
        at = start + size // 3
        path.write_bytes(sound[:at] + b"\x7f\xff\xff\xff" + sound[at + 4 :])
        assert len({outcome() for _ in range(15)}) == 1
