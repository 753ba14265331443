"""Whatever a file does to its reader is a SampleError of that file, the same each time; the next file is read."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.video import clips, damaged, injected_readers
from tests.video.test_loader import ONE_WORKER, is_alive, reads, requests, wait_until
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video import reader_process
from vcr1_fast.video.cache import TensorCache
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.quarantine import REASON_NAMES, reason_class
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.reader_process import ReaderProcess


def refusal(loader: FrameLoader, request: ClipRequest) -> str:
    with pytest.raises(SampleError) as caught:
        loader.get(request)
    assert caught.value.source == request.path
    return caught.value.reason


def test_damaged_files_are_refused_for_the_same_reason_each_time_and_everywhere(tmp_path: Path):
    """In a worker twice, and in this process; the worker survives all of it."""
    sound = clips.write_clip(tmp_path / "sound.mp4", num_frames=60)
    for kind, (make, _) in damaged.KINDS.items():
        make(sound, tmp_path / f"{kind}.mp4")
    in_worker = VideoConfig(num_workers=1, max_source_pixels=damaged.MAX_SOURCE_PIXELS)
    here = VideoConfig(num_workers=0, max_source_pixels=damaged.MAX_SOURCE_PIXELS)
    with contextlib.closing(FrameLoader(in_worker)) as loader, contextlib.closing(FrameLoader(here)) as plain:
        loader.prefetch(requests(tmp_path, *damaged.KINDS, config=in_worker))
        for kind in damaged.KINDS:
            reasons = [
                refusal(loader, *requests(tmp_path, kind, config=in_worker)),
                refusal(loader, *requests(tmp_path, kind, config=in_worker)),
                refusal(plain, *requests(tmp_path, kind, config=here)),
            ]
            assert len(set(reasons)) == 1, reasons
            assert damaged.is_class_of(kind, reason_class(reasons[0])), reasons[0]
            assert "\n" not in reasons[0] and str(os.getpid()) not in reasons[0]
        frames = loader.get(ClipRequest(str(sound), in_worker))
        assert torch.equal(frames.rgb_FHW3, plain.get(ClipRequest(str(sound), here)).rgb_FHW3)
        metrics = loader.metrics()
    assert (metrics["video/clips_read"], metrics["video/clips_refused"]) == (1, 2 * len(damaged.KINDS))
    assert metrics["video/workers_replaced"] == 0


def test_a_reader_that_hangs_with_the_interpreter_lock_held_is_killed(tmp_path: Path):
    config = VideoConfig(num_workers=1, timeout_s=3.0)
    hang, good = requests(tmp_path, "hang1", "7", config=config)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up)) as loader:
        loader.prefetch([hang, good])
        loader.start()
        wait_until(lambda: reads(tmp_path) == ["hang1"], limit_s=120)
        [pid] = loader.worker_pids
        started = time.monotonic()
        assert refusal(loader, hang) == "made-up 1 did not finish within 3 s (video.timeout_s)"
        assert time.monotonic() - started < 10
        assert not is_alive(pid)
        assert loader.get(good).rgb_FHW3[0, 0, 0, 0] == 7
        assert loader.worker_pids != [pid]
        metrics = loader.metrics()
    assert (metrics["video/timeouts"], metrics["video/workers_replaced"], metrics["video/crashes"]) == (1, 1, 0)
    assert reads(tmp_path) == ["hang1", "7"]  # a clip that hangs is not tried twice


def test_threads_that_take_too_long_are_replaced(tmp_path: Path):
    """All four threads sleep for a minute over clips that were only named; the clip that is wanted is the fifth."""
    config = VideoConfig(num_workers=0, timeout_s=1.5)
    wanted = requests(tmp_path, "long1", "long2", "long3", "long4", "7", config=config)
    started = time.monotonic()
    loader = FrameLoader(config, open_reader=injected_readers.made_up)
    loader.prefetch(wanted)
    assert loader.get(wanted[-1]).rgb_FHW3[0, 0, 0, 0] == 7
    for request in wanted[:4]:
        assert refusal(loader, request) == "made-up 1 did not finish within 1.5 s (video.timeout_s)"
    assert 1.5 <= time.monotonic() - started < 10
    metrics = loader.metrics()
    loader.close()
    assert time.monotonic() - started < 10  # and nobody waits for those that sleep
    assert (metrics["video/timeouts"], metrics["video/clips_read"], metrics["video/clips_refused"]) == (4, 1, 4)
    assert sorted(reads(tmp_path)) == ["7", "long1", "long2", "long3", "long4"]


def test_what_comes_too_late_is_not_taken(tmp_path: Path):
    """The clip takes half a second, a fifth is allowed; it is given up, and what it gave in the end changes nothing."""
    config = VideoConfig(num_workers=0, timeout_s=0.2)
    slow, good = requests(tmp_path, "slow1", "2", config=config)
    cache = TensorCache(None, 1 << 20, 0)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up, cache=cache)) as loader:
        before = set(threading.enumerate())
        for path in (slow.path, good.path):
            Path(path).touch()
        assert "did not finish within 0.2 s" in refusal(loader, slow)
        wait_until(lambda: set(threading.enumerate()) - before == set(loader._threads))  # the late one has ended
        assert loader.get(good).rgb_FHW3[0, 0, 0, 0] == 2
        wait_until(lambda: cache.metrics()["cache/ram_entries"] == 1)
        metrics = loader.metrics()
    assert (metrics["video/timeouts"], metrics["video/clips_read"], metrics["video/clips_refused"]) == (1, 1, 1)
    assert metrics["video/waiting_bytes"] == 0


@pytest.mark.parametrize("num_workers", [0, 1], ids=["threads", "worker"])
def test_a_reader_that_cannot_go_on_blames_no_file(tmp_path: Path, num_workers: int):
    config = VideoConfig(num_workers=num_workers)
    [request] = requests(tmp_path, "nomemory", config=config)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up)) as loader:
        with pytest.raises(ReaderError, match="no memory left on purpose"):
            loader.get(request)
        assert loader.metrics()["video/clips_refused"] == 0


def test_a_worker_that_crashes_gets_one_successor_for_the_same_clip(tmp_path: Path):
    """By a fault of its own on one file, once and always; and killed from outside, in mid-read and while idle."""
    once, always, slow, good = requests(tmp_path, "once5", "crash6", "slow7", "8", config=ONE_WORKER)
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)) as loader:
        loader.prefetch([once, always, slow, good])
        assert loader.get(once).rgb_FHW3[0, 0, 0, 0] == 5
        assert refusal(loader, always) == "made-up 1 crashed on it twice (signal 11); is the file damaged?"
        wait_until(lambda: reads(tmp_path)[-1] == "slow7", limit_s=120)
        os.kill(loader.worker_pids[0], signal.SIGKILL)
        assert loader.get(slow).rgb_FHW3[0, 0, 0, 0] == 7
        loader.get(good)
        os.kill(loader.worker_pids[0], signal.SIGKILL)
        assert loader.get(good).rgb_FHW3[0, 0, 0, 0] == 8
        metrics = loader.metrics()
    assert reads(tmp_path) == ["once5", "once5", "crash6", "crash6", "slow7", "slow7", "8", "8"]
    assert (metrics["video/crashes"], metrics["video/workers_replaced"]) == (5, 5)
    assert (metrics["video/clips_read"], metrics["video/clips_refused"]) == (4, 1)


def test_a_worker_that_is_killed_while_it_starts_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice while it imports torch: the third reads. Every time: the loader gives up, and blames no file."""
    monkeypatch.setattr(reader_process, "START_PAUSES_S", (0.0, 0.1, 0.0))
    deaths = [True, True, False]
    start = subprocess.Popen

    def start_mortal(*arguments: Any, **options: Any) -> Any:
        process = start(*arguments, **options)
        if deaths.pop(0) if len(deaths) > 1 else deaths[0]:
            process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", start_mortal)
    [good] = requests(tmp_path, "8", config=ONE_WORKER)
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)) as loader:
        assert loader.get(good).rgb_FHW3[0, 0, 0, 0] == 8
        assert loader.metrics()["video/crashes"] == 2
    deaths[:] = [True]
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)) as loader:
        with pytest.raises(ReaderError, match=r"made-up 1 did not start: 4 times in a row: .*signal 9"):
            loader.get(good)
        assert loader.metrics()["video/clips_refused"] == 0


def test_a_worker_killed_before_it_began_a_clip_blames_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three times in a row, where two over the clip itself would make it a bad one."""
    monkeypatch.setattr(reader_process, "START_PAUSES_S", (0.0, 0.0, 0.0))
    ask, num_killed = ReaderProcess.ask, 0

    def ask_the_dead(self: ReaderProcess, request: ClipRequest, timeout_s: float) -> Any:
        nonlocal num_killed
        if num_killed < 3:
            num_killed += 1
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()
        return ask(self, request, timeout_s)

    monkeypatch.setattr(ReaderProcess, "ask", ask_the_dead)
    [good] = requests(tmp_path, "8", config=ONE_WORKER)
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)) as loader:
        assert loader.get(good).rgb_FHW3[0, 0, 0, 0] == 8
    assert num_killed == 3 and reads(tmp_path) == ["8"]


def test_workers_are_replaced_after_their_share_of_clips_and_nothing_is_lost(tmp_path: Path):
    config = VideoConfig(num_workers=1, clips_per_worker=3)
    wanted = requests(tmp_path, *map(str, range(7)), config=config)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up)) as loader:
        loader.prefetch(wanted)
        assert [int(loader.get(request).rgb_FHW3[0, 0, 0, 0]) for request in wanted] == list(range(7))
        assert loader.metrics()["video/workers_replaced"] == 2
    pids = [line.split()[1] for line in (tmp_path / "reads.txt").read_text().splitlines()]
    assert [len(set(pids[k : k + 3])) for k in (0, 3, 6)] == [1, 1, 1] and len(set(pids)) == 3
    assert reads(tmp_path) == [str(k) for k in range(7)]


def test_reasons_fall_into_classes():
    for name, reason in {
        "timeout": "pyav 18 did not finish within 60 s (video.timeout_s)",
        "crash": "pyav 18 crashed on it twice (signal 11); is the file damaged?",
        "damaged": "the frame at 2.00 s is damaged; fetch the file again",
        "other": "the annotation is strange",
    }.items():
        assert reason_class(reason) == name and name in REASON_NAMES
