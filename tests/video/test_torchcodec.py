"""torchcodec gives PyAV's frames, or refuses by name.

Where it does not load in this process, because there is no FFmpeg but PyAV's, its tests run in one where it does.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from tests.video import clips, corpus
from tests.video.corpus import Clip
from tests.video.torchcodec_process import link_libraries, run_python
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import torchcodec_reader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import open_reader, read_resized
from vcr1_fast.video.reader import UnsuitedError
from vcr1_fast.video.torchcodec_reader import TorchcodecReader

REASON = torchcodec_reader.unavailable_reason()
HERE = Path(__file__).parent
needs_torchcodec = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.skipif(REASON is None, reason="torchcodec loads, its tests run in this process")
def test_with_the_ffmpeg_inside_pyav(tmp_path: Path):
    if "not installed" in str(REASON):
        pytest.skip(str(REASON))
    bundled = link_libraries(tmp_path)
    if bundled is None:
        pytest.skip("PyAV was built without libraries of its own")
    code = "from vcr1_fast.video.torchcodec_reader import unavailable_reason; print(unavailable_reason())"
    if (reason := run_python(["-c", code], (tmp_path, bundled)).stdout.strip()) != "None":
        pytest.skip(f"torchcodec does not load with PyAV's FFmpeg either: {reason}")
    # Its own tests and those of all readers; 12 s of CPU time.
    names = ("test_readers.py", "test_source_limits.py", "test_torchcodec.py", "test_parity.py")
    files = [str(HERE / name) for name in names]
    pytest_arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "torchcodec", "-rs", *files]
    done = run_python(pytest_arguments, (tmp_path, bundled))
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1]) >= 25, done.stdout[-4000:]


def test_missing_or_broken_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    config = VideoConfig(reader="torchcodec")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0")
        patch.setitem(sys.modules, "torchcodec.decoders", None)  # import raises ImportError
        with pytest.raises(RuntimeError, match=r"does not load .*apt install ffmpeg.* or set video.reader to pyav"):
            open_reader(config)
    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(ModuleNotFoundError, match=r"pip install vcr1-fast\[torchcodec\], or set video.reader to pyav"):
        open_reader(config)


@needs_torchcodec
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, see test_parity.py")
def test_without_a_gpu_that_it_decodes_on_it_says_why():
    assert torchcodec_reader.cuda_failure("h264") is not None
    with pytest.raises(
        RuntimeError, match=r"decodes nothing right on this GPU \(h264: .+\): it needs a build for CUDA"
    ):
        open_reader(VideoConfig(reader="torchcodec_cuda"))


@needs_torchcodec
def test_what_nvdec_would_get_wrong_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the rules alone, and by a decoder on the CPU behind them."""
    monkeypatch.setattr(torchcodec_reader, "cuda_failure", lambda codec: None if codec in ("h264", "av1") else "no")
    reader = TorchcodecReader(device="cuda")
    reader._device = "cpu"
    assert reader.name.startswith("torchcodec_cuda 0.") and " h264+av1 (FFmpeg " in reader.name
    right = corpus.write(Clip("a.mp4", "h264", "mp4", size_px=(64, 96)), tmp_path)
    frames = reader.read_frames(reader.probe(str(right)), [0, 5, 5], 56, 84)
    plain = read_resized(PyavReader(), PyavReader().probe(str(right)), [0, 5, 5], 56, 84)
    assert torch.equal(frames, plain)
    reader.probe(str(corpus.write(Clip("b.mp4", "av1", "mp4", size_px=(64, 64)), tmp_path)))
    for clip, reason in (
        (Clip("c.mp4", "hevc", "mp4", size_px=(64, 96)), "its codec is hevc, wanted one of h264, av1"),
        (
            Clip("d.mp4", "h264", "mp4", size_px=(64, 96), pix_fmt="yuv444p"),
            "its pixel format is yuv444p, wanted yuv420p or yuvj420p",
        ),
    ):
        with pytest.raises(UnsuitedError, match=rf"{reason}.*set video\.reader to pyav"):
            reader.probe(str(corpus.write(clip, tmp_path)))


@needs_torchcodec
def test_other_frames_than_were_probed_are_refused(tmp_path: Path):
    path = tmp_path / "a.mp4"
    for num_frames, fps, reason in (
        (21, 30, "sees 21 frames where 20 are shown"),
        (20, 25, r"gives the frame of 0\.200 s where that of 0\.167 s is wanted"),
    ):
        probe = TorchcodecReader().probe(str(clips.write_clip(path, num_frames=20)))
        clips.write_clip(path, num_frames, fps)  # the file was replaced after it was probed
        with pytest.raises(SampleError, match=reason):
            list(TorchcodecReader().read(probe, [0, 5]))
