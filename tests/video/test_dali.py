"""DALI on the CPU, for real, over VP8, VP9 and MJPEG: the same code runs on a GPU (test_dali_gpu.py)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from tests.video import clips, corpus
from tests.video.corpus import Clip
from tests.video.test_loader_memory import resident_bytes
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import dali_codecs, dali_pipeline, dali_reader
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.dali_reader import DaliReader
from vcr1_fast.video.dali_track import MATRICES, inspect, refusal, to_displayed
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import SourceReader
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.resolution import resize_frame

needs_dali = pytest.mark.skipif(dali_codecs.version() is None, reason="DALI is not installed")


@pytest.fixture(scope="module")
def reader() -> Iterator[DaliReader]:
    if dali_codecs.version() is None:
        pytest.skip("DALI is not installed")
    opened = DaliReader(VideoConfig(), "cpu")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames that say their number."""
    return write_numbered(tmp_path_factory.mktemp("scene") / "scene.webm", 60, (96, 128))


def write_numbered(
    path: Path, num_frames: int, size_px: tuple[int, int], encoder: str = "libvpx-vp9", noise: int = 1
) -> Path:
    """Frame k says k; `noise` levels of noise on it make the packets large."""
    rng = np.random.default_rng(0)
    grain = [rng.integers(0, noise, (*size_px, 1)).astype(np.uint8) for _ in range(num_frames)]
    pictures = [clips.numbered(k, *size_px) // 4 * 3 + grain[k] for k in range(num_frames)]
    fast = {"crf": "10", "b": "2M", "deadline": "realtime", "cpu-used": "6", "g": "20"}
    options = {"qmin": "1", "qmax": "2"} if encoder == "mjpeg" else fast
    return clips.write_clip(path, size_px=size_px, pictures=pictures, encoder=encoder, options=options)


def all_frames(reader: DaliReader | PyavReader, path: Path) -> np.ndarray:
    probe = reader.probe(str(path))
    return np.stack(list(reader.read(probe, range(len(probe.times_s)))))


VP9 = Clip("a.mp4", "vp9", "mp4", corpus.NTSC)
MJPEG = Clip("a.avi", "mjpeg", "avi", is_full_range=True, pix_fmt="yuvj420p")


@pytest.mark.parametrize("clip", [Clip("a.webm", "vp8", "webm"), VP9, MJPEG, replace(VP9, pix_fmt="yuv444p")])
def test_pixels_are_those_of_ffmpeg_without_short_cuts(tmp_path: Path, reader: DaliReader, clip: Clip) -> None:
    """Bit for bit: so what test_parity.py allows DALI is FFmpeg's short cut in chroma, and nothing else."""
    path = corpus.write(clip, tmp_path)
    how = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    with av.open(str(path)) as container:
        frames = [VideoReformatter().reformat(f, format="rgb24", interpolation=how) for f in container.decode(video=0)]
    wanted = np.stack([frame.to_ndarray() for frame in frames])
    assert np.array_equal(all_frames(reader, path), wanted)


@pytest.mark.parametrize(
    "clip", [VP9, replace(VP9, size_px=(51, 67), turn_deg=270), replace(VP9, matrix="709", is_tagged=True)]
)
@pytest.mark.parametrize("scale", [0.7, 1.6])
def test_frames_resized_by_dali(tmp_path: Path, reader: DaliReader, clip: Clip, scale: float) -> None:
    path = corpus.write(clip, tmp_path)
    height_px, width_px = (round(side * scale) for side in clip.displayed_px)
    indices = (0, 3, 3, 7, 19)
    probe = reader.probe(str(path))
    got = reader.read_frames(probe, indices, height_px, width_px)
    assert got.shape == (5, height_px, width_px, 3) and got.dtype == torch.uint8 and got.device.type == "cpu"
    frames = [torch.from_numpy(rgb) for rgb in reader.read(probe, indices)]
    wanted = torch.stack([resize_frame(rgb, height_px, width_px) for rgb in frames])
    difference = (got.float() - wanted.float()).abs()
    # Both bicubic with antialias, in float32 and in fixed point. BT.709: clamped after instead of before the resize,
    # which rings at edges
    assert difference.mean() <= (1.2 if clip.matrix == "709" else 0.4)
    assert difference.max() <= (45 if clip.matrix == "709" else 12)


def test_frames_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch, reader: DaliReader, scene: Path) -> None:
    probe = reader.probe(str(scene))
    indices = tuple(range(0, 60, 4))
    wanted = reader.read_frames(probe, indices, 56, 84)
    monkeypatch.setattr(dali_reader, "MAX_DECODED_BYTES", 4 * 96 * 128 * 3)
    assert torch.equal(reader.read_frames(probe, indices, 56, 84), wanted)
    assert [clips.index_of(rgb) for rgb in reader.read(probe, indices)] == list(indices)


def test_a_file_is_read_through_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: DaliReader) -> None:
    path = write_numbered(tmp_path / "a.webm", 20, (64, 64))
    plain, opened = PyavReader.open, list[str]()

    def noted(self: PyavReader, path: str) -> Any:
        opened.append(path)
        return plain(self, path)

    monkeypatch.setattr(PyavReader, "open", noted)
    monkeypatch.setattr(dali_reader, "MAX_TRACKS", 1)
    probe = reader.probe(str(path))
    assert opened == [str(path)]
    assert [clips.index_of(rgb) for rgb in reader.read(probe, [3])] == [3] and len(opened) == 1
    other = str(corpus.write(Clip("b.mp4", "h264", "mp4"), tmp_path))
    assert SourceReader(reader, reader, PyavReader()).probe(other).codec == "h264"  # refused by DALI
    reader.probe(str(path))
    assert opened == [str(path), other, str(path)]  # one file is remembered


def test_what_dali_would_get_wrong_is_not_taken(tmp_path: Path) -> None:
    """By the rules alone: NVDEC is not here."""
    plain = inspect(str(corpus.write(Clip("a.mp4", "h264", "mp4", size_px=(96, 128)), tmp_path)), PyavReader())
    assert refusal(plain, "gpu", ("h264",)) is None and refusal(plain, "cpu", ("h264",)) is None
    for change, reason, devices in (
        ({"pixel_format": "yuv420p10le"}, "pixel format", ("gpu", "cpu")),
        ({"pixel_format": "yuv444p"}, "pixel format", ("gpu",)),
        ({"matrix": 8}, "colour matrix", ("gpu", "cpu")),
        ({"is_interlaced": True}, "interlaced", ("gpu", "cpu")),
        ({"is_best_track": False}, "several video tracks", ("gpu", "cpu")),
        ({"num_packets": 21}, "shows 20 frames of 21 packets", ("gpu", "cpu")),
        ({"num_listed": 25}, "header lists 25", ("gpu", "cpu")),
        ({"num_packets": 25, "num_hidden": 5, "num_listed": 25}, "edit list hides 5", ("gpu",)),
        ({"stored_size_px": (95, 128)}, "odd", ("gpu",)),
        ({"stored_size_px": (96, 40)}, "NVDEC does not take 40 x 96 px", ("gpu",)),
        ({"stored_size_px": (96, 5000)}, "NVDEC does not take 5000 x 96 px", ("gpu",)),
        ({"codec": "vp9", "is_full_range": True, "stored_size_px": (128, 128)}, "full range", ("gpu",)),
        ({"is_full_range": True}, "another colour range than its video", ("gpu",)),
        ({"is_full_range_inside": True}, "another colour range than its video", ("gpu",)),
        ({"probe": replace(plain.probe, ticks=None)}, "do not say when their frames are shown", ("gpu",)),
    ):
        track = replace(plain, **change)
        for device in ("gpu", "cpu"):
            got = refusal(track, device, ("h264", "vp9"))
            assert (got is not None and reason in got) if device in devices else got is None, (change, device, got)


def test_files_whose_times_or_range_nvdec_cannot_see_are_not_for_it(tmp_path: Path) -> None:
    """An AVI; and full range by the container alone, which FFmpeg believes and NVDEC never hears of."""
    avi = inspect(str(corpus.write(Clip("a.avi", "h264", "avi", size_px=(96, 128)), tmp_path)), PyavReader())
    assert "do not say when" in (refusal(avi, "gpu", ("h264",)) or "")
    inside = Clip("inside.mp4", "h264", "mp4", size_px=(96, 128), is_tagged=True, is_full_range=True)
    right = inspect(str(corpus.write(inside, tmp_path)), PyavReader())
    assert right.is_full_range and right.is_full_range_inside and refusal(right, "gpu", ("h264",)) is None
    plain = corpus.write(Clip("plain.mp4", "h264", "mp4", size_px=(96, 128)), tmp_path)
    outside = inspect(str(clips.insert_color_box(plain, tmp_path / "outside.mp4", is_full_range=True)), PyavReader())
    assert outside.is_full_range and not outside.is_full_range_inside
    assert "another colour range" in (refusal(outside, "gpu", ("h264",)) or "")


@pytest.mark.parametrize("words", ["Can't allocate 512 bytes on device 0.", "CUDA allocation failed", "std::bad_alloc"])
def test_a_gpu_without_memory_blames_no_file(monkeypatch: pytest.MonkeyPatch, scene: Path, words: str) -> None:
    """Through the loader, as a run meets it: an error of the file would be quarantined, this one ends the run."""

    class Full:
        def feed_input(self, name: str, data: object) -> None:
            raise RuntimeError(f"Critical error in pipeline:\nError in MIXED operator, encountered:\n\n{words}\nStack")

    monkeypatch.setattr(dali_pipeline.Pipeline, "_built", lambda self: Full())
    monkeypatch.setattr(dali_reader, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(dali_reader, "proven_codecs", lambda device: ("vp9",))
    config = VideoConfig(reader="dali", num_workers=0)
    with contextlib.closing(FrameLoader(config)) as loader:
        with pytest.raises(ReaderError, match=r"not enough memory on the \wpu: .*; free some"):
            loader.get(ClipRequest(str(scene), config))
        assert loader.metrics()["video/clips_refused"] == 0


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    folder.mkdir()
    mp4 = write_numbered(folder / "a.mp4", 60, (96, 128), noise=60)
    webm = write_numbered(folder / "a.webm", 60, (96, 128), noise=60)
    avi = write_numbered(folder / "a.avi", 60, (96, 128), "mjpeg", noise=60)

    def change(source: Path, name: str, what: bytes, at: float) -> Path:
        data = bytearray(source.read_bytes())
        start = int(len(data) * at)
        data[start : start + len(what)] = what
        path = folder / f"{name}{source.suffix}"
        path.write_bytes(data)
        return path

    noise = np.random.default_rng(1).integers(0, 256, 4000).astype(np.uint8).tobytes()
    quarter = folder / "quarter.webm"
    quarter.write_bytes(webm.read_bytes()[: webm.stat().st_size // 4])
    text = folder / "text.webm"
    text.write_bytes(b"not a video\n" * 50)
    return {
        "hole": (change(mp4, "hole", bytes(4000), 0.4), "is damaged: a packet of it"),
        "overwritten": (change(mp4, "noise", noise, 0.4), "is damaged: a packet of it"),
        "bytes skipped": (change(webm, "skipped", noise, 0.4), "is damaged: a packet of it comes after"),
        "cut": (quarter, "cut short"),
        "frames lost": (change(avi, "lost", bytes(4000), 0.4), "lists 60 frames|cannot be decoded"),
        "text": (text, "not a video file"),
    }


def test_damage_is_found(tmp_path: Path, reader: DaliReader, scene: Path) -> None:
    for kind, (path, reason) in damaged(tmp_path / "damaged").items():
        with pytest.raises(SampleError, match=reason) as caught:
            all_frames(reader, path)
        assert caught.value.source == str(path) and "\n" not in caught.value.reason, kind
    assert clips.index_of(all_frames(reader, scene)[31]) == 31  # and the reader goes on


def test_a_file_that_only_dali_refuses_does_not_harm_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: DaliReader, scene: Path
) -> None:
    """The pipeline that raised is built anew. The file is damaged after it was looked at."""
    path = write_numbered(tmp_path / "a.webm", 20, (64, 64))
    probe = reader.probe(str(path))
    monkeypatch.setattr(reader, "_track", lambda name: tracks[name])
    tracks = {str(path): inspect(str(path), PyavReader()), str(scene): inspect(str(scene), PyavReader())}
    path.write_bytes(b"something else" * 100)
    for _ in range(3):
        with pytest.raises(SampleError, match=r"cannot be decoded.*DALI says: .*Failed to create video decoder"):
            reader.read_frames(probe, [0, 1], 56, 56)
        got = reader.read_frames(tracks[str(scene)].probe, [5, 6], 56, 56)
        assert [clips.index_of(rgb.numpy()) for rgb in got] == [5, 6]


def test_frames_that_are_not_there_are_refused_and_dark_scenes_are_not(tmp_path: Path, reader: DaliReader) -> None:
    moving = write_numbered(tmp_path / "moving.webm", 20, (64, 64))
    probe = reader.probe(str(moving))
    indices = [2, 5, 9, 15]
    right = reader.read_frames(probe, indices, 56, 56)
    reader._require_real(probe, right, indices)
    for what, change in (("one colour", 0), ("one colour", 255), ("a copy", right[1].clone())):
        wrong = right.clone()
        wrong[2] = change
        with pytest.raises(SampleError, match=rf"{what}.* at 0\.30 s") as caught:
            reader._require_real(probe, wrong, indices)
        assert caught.value.source == str(moving)
    black = np.full((64, 64, 3), 12, np.uint8)
    pictures = [black] * 10 + [clips.numbered(3, 64, 64)] * 10
    still = tmp_path / "still.webm"
    clips.write_clip(still, size_px=(64, 64), pictures=pictures, encoder="libvpx-vp9", options={})
    got = reader.read_frames(reader.probe(str(still)), [0, 4, 12, 18, 19], 56, 56)
    assert got[0].float().std() < 2 and clips.index_of(got[4].numpy()) == 3


def test_several_threads(reader: DaliReader, scene: Path) -> None:
    probe = reader.probe(str(scene))
    got: dict[int, list[int]] = {}

    def read(place: int) -> None:
        frames = reader.read_frames(probe, [place, place + 20, 50 + place], 56, 84)
        got[place] = [clips.index_of(rgb.numpy()) for rgb in frames]

    for _ in range(3):
        threads = [threading.Thread(target=read, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {place: [place, place + 20, 50 + place] for place in range(6)}
        got.clear()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@needs_dali
def test_memory_stays_flat_and_closing_frees(scene: Path) -> None:
    threads_before = num_threads()
    opened = DaliReader(VideoConfig(), "cpu")
    probe = opened.probe(str(scene))
    for _ in range(20):
        opened.read_frames(probe, range(0, 60, 6), 56, 84)
    before = resident_bytes(os.getpid())
    for _ in range(200):
        opened.read_frames(probe, range(0, 60, 6), 56, 84)
    # 200 reads leave 27 MB of encoded and 300 MB of decoded bytes if kept
    assert resident_bytes(os.getpid()) - before < 8 << 20
    assert num_threads() > threads_before
    opened.close()
    assert num_threads() <= threads_before
    again = opened.read_frames(probe, [3], 56, 84)  # a closed reader still reads
    assert clips.index_of(again[0].numpy()) == 3
    opened.close()


@pytest.mark.parametrize("number", [1, 9])
def test_colours_of_another_matrix(tmp_path: Path, number: int) -> None:
    """Colours that BT.601 can hold come back within the rounding of 8 bits."""
    red, blue = MATRICES[number]
    path = corpus.write(Clip("a.webm", "vp9", "webm"), tmp_path)
    track = replace(inspect(str(path), PyavReader()), matrix=number)
    levels = np.arange(64, 193, 16) / 255
    rgb = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 1, 3)
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    u, v = (rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)
    as_601 = np.stack([luma + 1.402 * v, luma - 0.344136 * u - 0.714136 * v, luma + 1.772 * u], -1)
    assert as_601.min() > 0 and as_601.max() < 1 and np.abs(as_601 - rgb).max() * 255 > 10
    got = to_displayed(torch.from_numpy((as_601 * 255).round().astype(np.uint8)), track)
    assert np.abs(got.numpy() - rgb * 255).max() <= 1.6  # half a level in, times at most 1.2, half a level out


def test_why_dali_is_not_there_is_said_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = dali_codecs.unavailable_reason.__wrapped__
    if not torch.cuda.is_available():
        expected = "no CUDA device" if dali_codecs.version() else "not installed"
        assert expected in (ask("gpu") or "")
    with monkeypatch.context() as patch:
        patch.setattr(dali_codecs, "version", lambda: "1.0")
        patch.setattr(dali_codecs, "proof_failure", lambda codec, device: "frame 3 of 30 is another picture")
        assert ask("cpu") == "DALI does not decode vp8 here: frame 3 of 30 is another picture"
        patch.setattr(dali_codecs, "proof_failure", lambda codec, device: 1 / 0)
        assert "ZeroDivisionError" in (ask("cpu") or "")
    monkeypatch.setattr(dali_codecs, "version", lambda: None)
    monkeypatch.setattr(dali_reader, "version", lambda: None)
    monkeypatch.setattr(dali_reader, "unavailable_reason", ask)
    with pytest.raises(ModuleNotFoundError, match=r"DALI is not installed .*set video\.reader to pyav"):
        DaliReader(VideoConfig(), "cpu")


@needs_dali
def test_a_codec_counts_only_when_its_frames_come_out_right(monkeypatch: pytest.MonkeyPatch) -> None:
    prove, clip = dali_codecs.proof_failure.__wrapped__, dali_codecs.proof_clip
    assert dali_codecs.unavailable_reason("cpu") is None
    assert dali_codecs.proven_codecs("cpu") == ("vp8", "vp9", "mjpeg")
    assert "Failed to create video decoder" in (prove("h264", "cpu") or "")

    def shifted(codec: str) -> tuple[np.ndarray, np.ndarray]:
        encoded, frames = clip(codec)
        return encoded, frames[[0, *range(29)]]

    monkeypatch.setattr(dali_codecs, "proof_clip", shifted)
    assert prove("vp9", "cpu") == "frame 1 of 30 is another picture"
