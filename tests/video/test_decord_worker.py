"""The decord worker is killed when it hangs or dies, and the next file gets a fresh one."""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.video import clips
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import decord_reader
from vcr1_fast.video.decord_reader import DecordReader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import open_reader, read_frames

# A worker that is the real one, but for files named hang (loops in C with the GIL held) or crash.
HANGING_WORKER = """
from vcr1_fast.video import decord_worker as worker
import ctypes, os
real = worker.answer
def answer(out, path, indices, *limits):
    if indices is not None and path.endswith("hang.mp4"):
        ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL
    if indices is not None and path.endswith("crash.mp4"):
        os.abort()
    real(out, path, indices, *limits)
worker.answer = answer
worker.serve()
"""
COMMAND = (sys.executable, "-c", HANGING_WORKER)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_hanging_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    good = str(clips.write_clip(tmp_path / "good.mp4", num_frames=30))
    bad = str(clips.write_clip(tmp_path / "hang.mp4", num_frames=30))
    reader = DecordReader(timeout_s=60.0, worker_command=COMMAND)
    read_frames(good, VideoConfig(), reader)
    [first] = reader._idle
    reader.timeout_s = 1.0
    started = time.monotonic()
    with pytest.raises(SampleError, match="did not finish within 1 s"):
        read_frames(bad, VideoConfig(), reader)
    assert 0.9 < time.monotonic() - started < 20
    reader.timeout_s = 60.0
    assert not is_alive(first.process.pid)
    assert len(read_frames(good, VideoConfig(), reader).times_s) == 4
    [second] = reader._idle
    assert second.process.pid != first.process.pid
    reader.close()
    assert not is_alive(second.process.pid)


def test_a_crash_is_a_sample_error(tmp_path: Path) -> None:
    bad = str(clips.write_clip(tmp_path / "crash.mp4", num_frames=30))
    reader = DecordReader(timeout_s=30.0, worker_command=COMMAND)
    with pytest.raises(SampleError, match=r"crashed on it \(signal 6\)"):
        read_frames(bad, VideoConfig(), reader)
    assert reader._idle == []


def test_a_worker_that_died_while_idle_is_replaced(tmp_path: Path) -> None:
    good = str(clips.write_clip(tmp_path / "good.mp4", num_frames=30))
    reader = DecordReader(timeout_s=30.0)
    read_frames(good, VideoConfig(), reader)
    reader._idle[0].process.kill()
    reader._idle[0].process.wait()
    assert len(read_frames(good, VideoConfig(), reader).times_s) == 4
    reader.close()


def test_frames_left_unread_do_not_reach_the_next_file(tmp_path: Path) -> None:
    path = str(clips.write_clip(tmp_path / "good.mp4", num_frames=40))
    reader = DecordReader(timeout_s=30.0)
    probe = reader.probe(path)
    frames = reader.read(probe, range(40))
    first = next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert reader._idle == []
    [last] = reader.read(probe, [39])
    assert (clips.index_of(first), clips.index_of(last)) == (0, 39)
    reader.close()


def test_a_worker_that_cannot_start_blames_no_file(tmp_path: Path) -> None:
    path = str(clips.write_clip(tmp_path / "good.mp4", num_frames=4))
    reader = DecordReader(timeout_s=30.0, worker_command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match=r"did not start: the process ended \(exit status 3\)"):
        reader.probe(path)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_decord_does_not_decode_ahead_of_a_parent_that_takes_its_time(tmp_path: Path) -> None:
    """Of 300 frames of 0.7 MB, 207 MB together, 20 are wanted. More than those must not pile up while nobody reads."""
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=300, size_px=(360, 640)))
    with contextlib.closing(DecordReader(timeout_s=60.0)) as reader:
        probe = reader.probe(path)
        worker = reader._idle[0].process.pid
        before = resident_bytes(worker)
        frames = reader.read(probe, range(20))
        assert clips.index_of(next(frames)) == 0
        sizes = []
        for _ in range(10):  # left to itself it takes half a second for all of them
            time.sleep(0.15)
            sizes.append(resident_bytes(worker))
        assert [clips.index_of(rgb) for rgb in frames] == [k % 256 for k in range(1, 20)]
    assert max(sizes) - before < 80_000_000, (before, sizes)


def test_frames_that_are_fetched_in_parts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (70, 64, 96, 3)).astype(np.uint8)
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=70, rgb_FHW3=noise, bframes=3))
    indices = [0, 0, 1, 2, 28, 29, 30, 31, 31, 47, 59, 60, 61, 69]
    wanted = np.stack(list(PyavReader().read(PyavReader().probe(path), indices)))
    with contextlib.closing(DecordReader(timeout_s=60.0)) as reader:
        probe = reader.probe(path)
        for num_at_once in (1, 3, 100):
            monkeypatch.setattr(decord_reader, "PART_BYTES", num_at_once * wanted[0].nbytes)
            assert np.array_equal(np.stack(list(reader.read(probe, indices))), wanted)


def test_a_worker_is_replaced_after_its_share_of_reads(tmp_path: Path) -> None:
    """Also where threads of the trainer read, and no loader's worker ends with it."""
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=4))
    config = VideoConfig(reader="decord", clips_per_worker=3, num_workers=0)
    with contextlib.closing(open_reader(config)) as opened:
        reader = opened.files  # type: ignore[attr-defined]
        seen = []
        for _ in range(7):
            probe = reader.probe(path)
            seen.append(reader._idle[0].process.pid)
            assert len(list(reader.read(probe, [0, 1]))) == 2
    assert [seen[k] == seen[k + 1] for k in range(6)] == [True, True, False, True, True, False]
    assert not any(is_alive(pid) for pid in seen)
