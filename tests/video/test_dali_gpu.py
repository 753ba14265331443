"""DALI on a GPU: NVDEC's frames against FFmpeg's. A container needs NVIDIA_DRIVER_CAPABILITIES=video for libnvcuvid."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.video import clips, corpus
from tests.video.corpus import Clip
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import dali_codecs
from vcr1_fast.video.clip import ClipRequest, read_clip
from vcr1_fast.video.dali_reader import DaliReader
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.resolution import resize_frame

pytestmark = pytest.mark.gpu

# Levels of 255 over a clip of coloured edges: mean, 99.9th percentile. DALI's kernel interpolates chroma linearly and
# FFmpeg repeats it, as on the CPU (there 4.8 and 94); its chroma sits half a pixel away, and it rounds once more.
TOLERANCE = (8.0, 130.0)
MAX_BAR_MEAN, MAX_BAR_ERROR, MAX_BAR_ERROR_709 = 2.5, 8.0, 20.0


def large(name: str, codec: str, suffix: str, **options: Any) -> Clip:
    """NVDEC takes no VP9 and AV1 below 128 px, no HEVC below 144."""
    return Clip(name, codec, suffix, **{"size_px": (160, 192), **options})


RIGHT = (
    large("h264.mp4", "h264", "mp4", fps=24),
    large("h264.mkv", "h264", "mkv", fps=corpus.NTSC),
    large("h264.ts", "h264", "ts", fps=25),
    large("h264-variable.mp4", "h264", "mp4", times_ms=corpus.VARIABLE_MS),
    large("h264-turned.mp4", "h264", "mp4", turn_deg=90),
    Clip("h264-cropped.mp4", "h264", "mp4", size_px=(150, 190)),
    large("h264-full.mp4", "h264", "mp4", is_tagged=True, is_full_range=True),
    large("h264-709.mp4", "h264", "mp4", matrix="709", is_tagged=True),
    large("h264-late.mkv", "h264", "mkv", shift_s=2.0),
    large("h264-fragmented.mp4", "h264", "mp4", options=corpus.FRAGMENTED),
    large("hevc.mp4", "hevc", "mp4", fps=25),
    large("hevc-turned.mp4", "hevc", "mp4", turn_deg=270),
    large("vp8.webm", "vp8", "webm", fps=24),
    large("vp9.mp4", "vp9", "mp4", fps=25),
    large("av1.mp4", "av1", "mp4", fps=24),
    large("mpeg4.mp4", "mpeg4", "mp4", fps=25),
)


@pytest.fixture(scope="module")
def reader() -> Iterator[DaliReader]:
    reason = dali_codecs.unavailable_reason("gpu")
    if reason is not None:
        pytest.skip(reason)
    opened = DaliReader(VideoConfig(), "gpu")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    return clips.write_clip(path, num_frames=120, size_px=(160, 192), bframes=3)


def test_h264_and_hevc_are_proven(reader: DaliReader) -> None:
    """Any NVDEC since 2016 has both; the message says what came out wrong."""
    failures = {codec: dali_codecs.proof_failure(codec, "gpu") for codec in dali_codecs.CODECS["gpu"]}
    print(failures)
    assert failures["h264"] is None and failures["hevc"] is None


@pytest.mark.parametrize("clip", RIGHT, ids=lambda clip: clip.name)
def test_every_frame_is_the_right_one(tmp_path: Path, reader: DaliReader, clip: Clip) -> None:
    if clip.codec not in reader.codecs:
        pytest.skip(f"{clip.codec} did not pass its proof: {dali_codecs.proof_failure(clip.codec, 'gpu')}")
    path = str(corpus.write(clip, tmp_path))
    probe = reader.probe(path)
    everything = range(len(probe.times_s))
    got, wanted = (np.stack(list(r.read(probe, everything))) for r in (reader, PyavReader()))
    stored = [corpus.as_stored(rgb, clip) for rgb in got]
    assert [corpus.index_of(rgb) for rgb in stored] == clip.shown_indices
    difference = np.abs(got.astype(np.int16) - wanted)
    bars = np.abs(corpus.bars_of(stored[0]) - corpus.BARS_83)
    largest = np.percentile(difference, 99.9)
    print(f"{clip.name}: mean {difference.mean():.2f}, 99.9 % {largest:.0f}, bars {bars.max():.1f}")
    assert difference.mean() <= TOLERANCE[0] and largest <= TOLERANCE[1]
    assert bars.mean() <= MAX_BAR_MEAN and bars.max() <= (MAX_BAR_ERROR_709 if clip.matrix == "709" else MAX_BAR_ERROR)


def test_frames_are_ours(reader: DaliReader, scene: Path) -> None:
    probe = reader.probe(str(scene))
    first = reader.read_frames(probe, [0, 40, 40, 119], 112, 140)
    assert not first.is_cuda and first.shape == (4, 112, 140, 3) and first.dtype == torch.uint8
    kept = first.clone()
    for start in range(1, 20):  # would overwrite DALI's buffers
        reader.read_frames(probe, [start, start + 50], 112, 140)
    assert torch.equal(first, kept)
    assert [clips.index_of(rgb) for rgb in first.numpy()] == [0, 40, 40, 119]
    full = [torch.from_numpy(rgb) for rgb in reader.read(probe, [0, 40, 119])]
    wanted = torch.stack([resize_frame(rgb, 112, 140) for rgb in full]).float()
    difference = (first[[0, 1, 3]].float() - wanted).abs()
    assert difference.mean() <= 0.5 and difference.max() <= 12


def test_several_threads(reader: DaliReader, scene: Path) -> None:
    probe = reader.probe(str(scene))
    got: dict[int, list[int]] = {}

    def read(place: int) -> None:
        frames = reader.read_frames(probe, [place, place + 60, place + 100], 112, 140)
        got[place] = [clips.index_of(rgb) for rgb in frames.numpy()]

    threads = [threading.Thread(target=read, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {place: [place, place + 60, place + 100] for place in range(8)}


def test_the_loader_reads_ahead_with_a_broken_file_among_them(tmp_path: Path, reader: DaliReader, scene: Path) -> None:
    """In a process of its own, though none was asked for."""
    config = VideoConfig(reader="dali", num_workers=0, fps=4.0)
    starts_s = [max(0.0, (3 * k - 0.5) / 30) for k in range(20)]  # between two frames, so that rounding does not matter
    wanted = [ClipRequest(str(scene), config, start_s, start_s + 1.0) for start_s in starts_s]
    wanted[5] = ClipRequest(str(tmp_path / "gone.mp4"), config)
    with contextlib.closing(FrameLoader(config)) as loader:
        assert loader.num_processes == len(loader.worker_pids) == 1 and loader.name.startswith(reader.name)
        loader.prefetch(wanted)
        for k, request in enumerate(wanted):
            if k == 5:
                with pytest.raises(SampleError, match="no such file") as caught:
                    loader.get(request)
                assert caught.value.source == request.path
                continue
            got, alone = loader.get(request), read_clip(request, reader)
            assert torch.equal(got.rgb_FHW3, alone.rgb_FHW3)
            numbers = [clips.index_of(rgb) for rgb in got.rgb_FHW3.numpy()]
            assert numbers == [3 * k + round(time_s * 30) for time_s in got.times_s.tolist()]


def test_memory_on_the_device_stays_flat(reader: DaliReader, scene: Path) -> None:
    probe = reader.probe(str(scene))

    def used_bytes() -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    for _ in range(20):
        reader.read_frames(probe, range(0, 120, 10), 112, 140)
    before = used_bytes()
    for _ in range(200):
        reader.read_frames(probe, range(0, 120, 10), 112, 140)
    assert used_bytes() - before < 64 << 20
