"""Memory of trainer and workers over many clips: flat, and bounded where the decoder leaks."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from pathlib import Path

import pytest

from tests.video import clips, injected_readers
from tests.video.test_loader import num_mapped, requests
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader import FrameLoader

MB = 1_000_000


def resident_bytes(pid: int) -> int:
    """Private memory of a process (its share of a memfd or a library does not count)."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:  # it ends just now
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")


def test_recycling_bounds_what_a_leaking_decoder_takes(tmp_path: Path):
    """8 MB a clip over 40 clips are 320 MB; a worker that reads 10 clips leaks 80."""
    config = VideoConfig(num_workers=1, clips_per_worker=10)
    wanted = requests(tmp_path, *map(str, range(40)), config=config)
    sizes: defaultdict[int, list[int]] = defaultdict(list)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.leaky)) as loader:
        for request in wanted:  # nothing is read ahead, so the worker that has read it is still there
            loader.get(request)
            for pid in loader.worker_pids:
                sizes[pid].append(resident_bytes(pid))
        assert loader.metrics()["video/workers_replaced"] >= 3
    # the first reading of a worker may be of one that only starts, the last of one that ends
    settled = [size for of_worker in sizes.values() for size in of_worker[1:] if size > 0]
    assert max(settled) - min(settled) < 160 * MB
    assert max(settled) - min(settled) > 50 * MB  # it does leak, and here it is seen


def test_neither_files_nor_mappings_pile_up(tmp_path: Path):
    """Clips of 15 MB through shared memory, more than fit into the cache of the loader's results at once."""
    config = VideoConfig(num_workers=1, min_frame_pixels=280 * 280, total_pixels=64 * 280 * 280, min_frames=64)
    wanted = requests(tmp_path, *(f"big{k}" for k in range(12)), config=config)
    with contextlib.closing(FrameLoader(config, open_reader=injected_readers.made_up)) as loader:
        assert loader.get(wanted[0]).rgb_FHW3.nbytes == 64 * 280 * 280 * 3
        num_files = len(os.listdir("/proc/self/fd"))
        for k, request in enumerate(wanted):
            assert loader.get(request).rgb_FHW3[3, 5, 7, 1] == k + 3
            assert num_mapped() <= 1
        assert len(os.listdir("/proc/self/fd")) == num_files
    assert num_mapped() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 7 ms of CPU a clip, on a machine that may do other things too
@pytest.mark.parametrize(("reader", "num_clips"), [("pyav", 10_000), pytest.param("decord", 1_000, id="decord-1000")])
def test_memory_is_flat_over_many_reads(tmp_path: Path, reader: str, num_clips: int):
    """A real decoder without recycling; what is measured is growth after a tenth of the reads, of both processes.

    decord takes 100 s for 10,000 reads, too long for every run. What does grow without bound is one reader of it that
    is left alone (see test_decord), and what recycling is for is shown above.
    """
    path = str(clips.write_clip(tmp_path / "clip.mp4", num_frames=4, size_px=(56, 56)))
    config = VideoConfig(
        num_workers=1, reader=reader, clips_per_worker=num_clips + 1, min_frame_pixels=784, max_frame_pixels=784
    )
    with contextlib.closing(FrameLoader(config)) as loader:
        before: dict[int, int] = {}
        num_files = 0
        for start in range(0, num_clips, 100):
            # Parts that differ beyond the end of the file: all of it each time, and not two equal requests.
            wanted = [ClipRequest(path, config, 0.0, 1000.0 + start + k) for k in range(100)]
            loader.prefetch(wanted)
            for request in wanted:
                loader.get(request)
            if start + 100 == num_clips // 10:
                [worker] = loader.worker_pids
                before = {pid: resident_bytes(pid) for pid in (os.getpid(), worker)}
                num_files = len(os.listdir("/proc/self/fd"))
        after = {pid: resident_bytes(pid) for pid in (os.getpid(), *loader.worker_pids)}
        assert loader.metrics()["video/clips_read"] == num_clips
        assert len(os.listdir("/proc/self/fd")) <= num_files + 1
    assert after.keys() == before.keys() and len(after) == 2
    assert all(after[pid] - before[pid] < 20 * MB for pid in after), (before, after)
