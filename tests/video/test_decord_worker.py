"""The decord worker is killed when it hangs or dies, and the next file gets a fresh one."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.video import clips
from vcr1_fast.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.decord_reader import DecordReader
from vcr1_fast.video.read import read_frames

# A worker that is the real one, but for files named hang (loops in C with the GIL held) or crash.
HANGING_WORKER = """
from vcr1_fast.video import decord_worker as worker
import ctypes, os
real = worker.answer
def answer(out, path, indices, give_up_s):
    if indices is not None and path.endswith("hang.mp4"):
        ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL
    if indices is not None and path.endswith("crash.mp4"):
        os.abort()
    real(out, path, indices, give_up_s)
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
    reader = DecordReader(timeout_s=2.0, worker_command=COMMAND)
    read_frames(good, VideoConfig(), reader)
    [first] = reader._idle
    started = time.monotonic()
    with pytest.raises(SampleError, match="did not finish within 2 s"):
        read_frames(bad, VideoConfig(), reader)
    assert 1.9 < time.monotonic() - started < 20
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
