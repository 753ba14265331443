"""Clips read ahead: the same with any number of workers, each clip once, bounded, through shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.video import clips, injected_readers
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video import read
from vcr1_fast.video.cache import TensorCache
from vcr1_fast.video.clip import ClipRequest, read_clip
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.read import open_reader
from vcr1_fast.video.resolution import largest_clip_bytes
from vcr1_fast.video.shared_memory import SMALLEST_MAPPED_BYTES, map_tensor, write_tensor

NO_WORKER, ONE_WORKER = VideoConfig(num_workers=0), VideoConfig(num_workers=1)
SMALL = replace(NO_WORKER, max_frames=8, min_frame_pixels=3136, max_frame_pixels=3136, total_pixels=1 << 20)


def requests(folder: Path, *names: str, config: VideoConfig = NO_WORKER) -> list[ClipRequest]:
    return [ClipRequest(str(folder / f"{name}.mp4"), config) for name in names]


def reads(folder: Path) -> list[str]:
    """Stems of the files that `MadeUpReader` decoded, in order."""
    log = folder / "reads.txt"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.01)


@pytest.fixture(params=[0, 1], ids=["threads", "worker"])
def config(request: pytest.FixtureRequest) -> VideoConfig:
    return VideoConfig(num_workers=request.param)


def outcome(loader: FrameLoader, request: ClipRequest) -> tuple[object, ...]:
    try:
        frames = loader.get(request)
    except SampleError as error:
        return error.source, error.reason
    rgb = frames.rgb_FHW3
    return (rgb.shape, bytes(rgb.numpy().data), frames.times_s.tolist(), frames.sampled_fps, frames.duration_s)


def test_results_and_errors_are_those_of_the_plain_path_with_any_number_of_workers(tmp_path: Path):
    """Decoders that take an unforeseeable time, half of the clips read ahead, with and without a cache."""
    names = [f"{'broken' if k % 7 == 3 else 'bug' if k % 11 == 5 else ''}{k % 23}" for k in range(60)]
    for request in requests(tmp_path, *names):
        Path(request.path).touch()
    seen = []
    for num_workers, ram_bytes in ((0, 0), (3, 1 << 20)):
        config = VideoConfig(num_workers=num_workers, fps=2.0, min_frame_pixels=784, max_frame_pixels=784)
        wanted = requests(tmp_path, *names, config=config)
        cache = TensorCache(None, ram_bytes, 0) if ram_bytes else None
        with contextlib.closing(FrameLoader(config, open_reader=injected_readers.jittery, cache=cache)) as loader:
            loader.prefetch(wanted[:30])
            seen.append([outcome(loader, request) for request in wanted])
    assert seen[0] == seen[1]
    bugs = {result for result in seen[0] if len(result) == 2 and "bug" in str(result[0])}
    assert bugs == {
        (str(tmp_path / f"bug{k}.mp4"), "made-up 1 failed on it (ValueError: a bug in two lines); is the file damaged?")
        for k in (5, 16, 4, 3)
    }


def test_real_clips_and_parts_of_them_come_as_read_clip_gives_them(tmp_path: Path, config: VideoConfig):
    path = str(clips.write_clip(tmp_path / "clip.mp4", num_frames=90, size_px=(280, 364)))
    wanted = [ClipRequest(path, config), ClipRequest(path, config, 1.0, 2.5)]
    with contextlib.closing(FrameLoader(config)) as loader, contextlib.closing(open_reader(config)) as reader:
        assert loader.name == reader.name
        for request in wanted:
            got, want = loader.get(request), read_clip(request, reader)
            assert torch.equal(got.rgb_FHW3, want.rgb_FHW3) and torch.equal(got.times_s, want.times_s)
            assert (got.sampled_fps, got.duration_s, got.reader) == (want.sampled_fps, want.duration_s, want.reader)


def test_a_clip_named_and_asked_for_several_times_is_decoded_once(tmp_path: Path):
    loader = FrameLoader(NO_WORKER, open_reader=injected_readers.made_up)
    [slow] = requests(tmp_path, "slow1")
    loader.prefetch([slow, slow, slow])
    got: list[Frames] = []
    threads = [threading.Thread(target=lambda: got.append(loader.get(slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads(tmp_path) == ["slow1"]
    assert len({frames.rgb_FHW3.data_ptr() for frames in got}) == 1
    assert loader.metrics()["video/waiting_bytes"] == 0  # got as often as named: let go
    assert loader.metrics()["video/wait_s"] > 0.4
    loader.close()


def test_what_someone_waits_for_comes_before_what_was_only_named(tmp_path: Path):
    names = ["slow1", "2", "3", "4"]
    wanted, [now] = requests(tmp_path, *names, config=ONE_WORKER), requests(tmp_path, "99", config=ONE_WORKER)
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)) as loader:
        loader.prefetch(wanted)
        wait_until(lambda: reads(tmp_path) == ["slow1"])
        assert loader.get(now).rgb_FHW3[0, 0, 0, 0] == 99
        assert loader.get(wanted[3]).rgb_FHW3[0, 0, 0, 0] == 4  # named, but its turn had not come
        assert [int(loader.get(request).rgb_FHW3[0, 0, 0, 0]) for request in wanted[:3]] == [1, 2, 3]
    assert reads(tmp_path)[:2] == ["slow1", "99"]
    assert sorted(reads(tmp_path)) == sorted([*names, "99"])


def test_no_more_is_read_ahead_than_there_is_room_for(tmp_path: Path):
    """Room for three clips and for one more of the largest size that may come."""
    clip_bytes = 8 * 56 * 56 * 3
    assert largest_clip_bytes(SMALL) == clip_bytes
    wanted = requests(tmp_path, *map(str, range(10)), config=SMALL)
    with contextlib.closing(
        FrameLoader(SMALL, open_reader=injected_readers.made_up, max_waiting_bytes=4 * clip_bytes)
    ) as loader:
        loader.prefetch(wanted)
        wait_until(lambda: loader.metrics()["video/waiting_bytes"] == 4 * clip_bytes)
        time.sleep(0.2)
        assert len(reads(tmp_path)) == 4
        for k, request in enumerate(wanted):
            assert loader.get(request).rgb_FHW3[0, 0, 0, 0] == k
            assert loader.metrics()["video/waiting_bytes"] <= 4 * clip_bytes
    assert sorted(map(int, reads(tmp_path))) == list(range(10))


def test_room_is_counted_by_what_each_clip_may_take(tmp_path: Path):
    """A clip of up to 32 frames asked of a loader whose own have 8: with one that waits there is no room for it."""
    clip_bytes = 8 * 56 * 56 * 3
    [small, more] = requests(tmp_path, "1", "2", config=SMALL)
    more = replace(more, config=replace(SMALL, max_frames=32))
    assert largest_clip_bytes(more.config) == 4 * clip_bytes
    with contextlib.closing(
        FrameLoader(SMALL, open_reader=injected_readers.made_up, max_waiting_bytes=4 * clip_bytes)
    ) as loader:
        loader.prefetch([small, more])
        wait_until(lambda: loader.metrics()["video/waiting_bytes"] == clip_bytes)
        time.sleep(0.2)
        assert reads(tmp_path) == ["1"]
        loader.get(small)
        wait_until(lambda: reads(tmp_path) == ["1", "2"])


def test_one_clip_is_read_ahead_even_where_the_budget_is_too_small(tmp_path: Path):
    wanted = requests(tmp_path, "1", "2")
    with contextlib.closing(
        FrameLoader(NO_WORKER, open_reader=injected_readers.made_up, max_waiting_bytes=1)
    ) as loader:
        loader.prefetch(wanted)
        wait_until(lambda: loader.metrics()["video/clips_read"] == 1)
        assert [int(loader.get(request).rgb_FHW3[0, 0, 0, 0]) for request in wanted] == [1, 2]


def test_clips_no_one_comes_for_make_room(tmp_path: Path):
    """With a window of 4 clips: 4 named in vain are dropped one by one as later ones are got."""
    in_vain, later = requests(tmp_path, "1", "2", "3", "4"), requests(tmp_path, "5", "6", "7", "8")
    with contextlib.closing(FrameLoader(NO_WORKER, open_reader=injected_readers.made_up, max_clips=4)) as loader:
        loader.prefetch([*in_vain, *later])  # those of `later` do not fit: hints that are dropped
        wait_until(lambda: loader.metrics()["video/clips_read"] == 4)
        held = loader.metrics()["video/waiting_bytes"]
        for k, request in enumerate(later):
            loader.get(request)
            assert loader.metrics()["video/waiting_bytes"] == held * (3 - k) / 4
    assert sorted(reads(tmp_path)) == [str(k) for k in range(1, 9)]


def test_a_clip_that_is_not_needed_after_all_is_let_go_or_never_read(tmp_path: Path):
    wanted = requests(tmp_path, "1", "slow2", "slow3", "slow4", "slow5", "6")
    with contextlib.closing(FrameLoader(NO_WORKER, open_reader=injected_readers.made_up)) as loader:
        loader.prefetch([wanted[0], *wanted])
        wait_until(lambda: loader.metrics()["video/clips_read"] == 1)
        held = loader.metrics()["video/waiting_bytes"]
        loader.skip(wanted[0])
        assert loader.metrics()["video/waiting_bytes"] >= held > 0  # it was named twice
        loader.skip(wanted[0])
        loader.skip(wanted[5])  # the four threads sleep half a second each before its turn comes
        for request in wanted[1:5]:
            loader.get(request)
        loader.skip(ClipRequest("/nowhere/9.mp4", NO_WORKER))
        assert loader.metrics()["video/waiting_bytes"] == 0
    assert sorted(reads(tmp_path)) == ["1", "slow2", "slow3", "slow4", "slow5"]


def test_the_cache_is_asked_first_and_filled_after(tmp_path: Path, config: VideoConfig):
    clip = clips.write_clip(tmp_path / "5.mp4", num_frames=4)
    request = ClipRequest(str(clip), config)
    cache = TensorCache(tmp_path / "cache", 1 << 20, 1 << 20)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up, cache=cache)) as loader:
        first = loader.get(request)
        wait_until(lambda: cache.metrics()["cache/ram_bytes"] > 0)  # it is handed out before it is stored
        again = loader.get(request)
        assert loader.metrics()["video/cache_hits"] == 1
    other = TensorCache(tmp_path / "cache", 0, 1 << 20)  # as another run
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up, cache=other)) as loader:
        from_disk = loader.get(request)
    assert reads(tmp_path) == ["5"]
    for frames in (again, from_disk):
        assert torch.equal(frames.rgb_FHW3, first.rgb_FHW3) and torch.equal(frames.times_s, first.times_s)


def test_closing_ends_workers_in_the_middle_of_a_clip_and_frees_who_waits(tmp_path: Path):
    loader = FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up)
    [long] = requests(tmp_path, "long1", config=ONE_WORKER)
    problems: list[Exception] = []

    def get() -> None:
        try:
            loader.get(long)
        except RuntimeError as error:
            problems.append(error)

    waiting = threading.Thread(target=get)
    waiting.start()
    wait_until(lambda: reads(tmp_path) == ["long1"])
    [pid] = loader.worker_pids
    started = time.monotonic()
    loader.close()
    waiting.join(10)
    assert time.monotonic() - started < 5 and not is_alive(pid)
    assert len(problems) == 1 and "closed" in str(problems[0])
    loader.close()  # twice does no harm
    with pytest.raises(RuntimeError, match="closed"):
        loader.get(long)


def test_a_worker_that_cannot_start_blames_no_file():
    loader = FrameLoader(ONE_WORKER, open_reader=injected_readers.failing_in_workers)
    with pytest.raises(
        RuntimeError, match=r"did not start: ImportError: no such decoder here; try video\.num_workers=0"
    ):
        loader.get(ClipRequest("/nowhere/1.mp4", ONE_WORKER))
    loader.close()


def test_workers_import_neither_transformers_nor_what_trains():
    script = "import sys, vcr1_fast.video.loader_worker, vcr1_fast.video.clip, vcr1_fast.video.pyav_reader;"
    script += "print([m for m in ('transformers', 'datasets', 'vcr1_fast.learner') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell started the tests in the background
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader import FrameLoader
from tests.video import injected_readers
config = VideoConfig(num_workers=2)
loader = FrameLoader(config, open_reader=injected_readers.made_up)
folder = sys.argv[1]
loader.get(ClipRequest(f"{folder}/big1.mp4", config))
loader.prefetch([ClipRequest(f"{folder}/long{k}.mp4", config) for k in range(2)])
print(*loader.worker_pids, flush=True)
try:
    loader.get(ClipRequest(f"{folder}/long0.mp4", config))
except KeyboardInterrupt:
    loader.close()
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_no_process_and_no_memory_outlives_the_trainer(tmp_path: Path, sign: signal.Signals):
    """Two workers are in the middle of a clip of a minute."""
    before = set(os.listdir("/dev/shm"))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    wait_until(lambda: sorted(reads(tmp_path)) == ["big1", "long0", "long1"])
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    process.send_signal(sign)
    rest = process.stdout.read()
    assert process.wait(20) == (-signal.SIGKILL if sign == signal.SIGKILL else 0)
    assert rest == ("" if sign == signal.SIGKILL else "interrupted\n")
    wait_until(lambda: not any(is_alive(pid) for pid in pids), limit_s=5)
    assert {name for name in os.listdir("/dev/shm") if "vcr1" in name} <= before


def num_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("vcr1-frames")


def test_shared_memory_is_freed_with_the_last_view_and_holds_no_file_open():
    num_files, num_before = len(os.listdir("/proc/self/fd")), num_mapped()
    sent = torch.arange(SMALLEST_MAPPED_BYTES // 8, dtype=torch.float64)
    file = write_tensor(sent)
    got = map_tensor(file, sent.shape, torch.float64)
    os.close(file)
    assert torch.equal(got, sent) and got.untyped_storage().nbytes() == got.nbytes
    assert (len(os.listdir("/proc/self/fd")), num_mapped()) == (num_files, num_before + 1)
    view = got[5:7]
    del got
    assert num_mapped() == num_before + 1 and view.tolist() == [5.0, 6.0]
    del view
    assert num_mapped() == num_before
    file = write_tensor(sent[:4])
    assert map_tensor(file, (2, 2), torch.float64).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert num_mapped() == num_before  # a small one is copied
    os.close(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, see test_dali_gpu.py")
def test_a_reader_of_a_gpu_is_opened_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Also where no worker is asked for. Without a GPU that goes as far as taking it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    config = replace(NO_WORKER, reader="dali+pyav")
    assert (read.gpu_index(config), read.num_processes(config)) == (3, 1)
    assert (read.gpu_index(NO_WORKER), read.num_processes(ONE_WORKER)) == (None, 1)
    with pytest.raises(RuntimeError, match=r"videos with dali\+pyav did not start: \w+: .*cuda.*; set video\.reader"):
        FrameLoader(config)


@pytest.mark.gpu
def test_pixels_are_pinned_for_a_gpu(tmp_path: Path):
    with contextlib.closing(FrameLoader(ONE_WORKER, open_reader=injected_readers.made_up, pin_memory=True)) as loader:
        frames = loader.get(requests(tmp_path, "7", config=ONE_WORKER)[0])
    assert frames.rgb_FHW3.is_pinned() and bool((frames.rgb_FHW3[0] == 7).all())


def test_functions_that_workers_cannot_import_are_refused_at_once():
    with pytest.raises((AttributeError, TypeError), match=r"local object|pickle"):
        FrameLoader(ONE_WORKER, open_reader=lambda config: PyavReader())
