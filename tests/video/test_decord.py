"""decord reads in parts, in a process that can be killed; test_readers.py and test_parity.py have what it gives."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.video import clips
from tests.video.test_loader_memory import resident_bytes
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.video import decord_reader
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.decord_reader import DecordReader
from vcr1_fast.video.loader import FrameLoader
from vcr1_fast.video.pyav_reader import PyavReader

pytest.importorskip("decord")


def test_it_has_a_process_of_its_own_where_threads_are_asked_for(tmp_path: Path) -> None:
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=20))
    config = VideoConfig(reader="decord", num_workers=0)
    with contextlib.closing(FrameLoader(config)) as loader:
        frames = loader.get(ClipRequest(path, config))
        assert frames.reader.startswith("decord 0.") and len(loader.worker_pids) == 1 == loader.num_processes


def test_decord_does_not_decode_ahead_of_who_takes_its_time(tmp_path: Path) -> None:
    """Of 300 frames of 0.7 MB, 207 MB together, 20 are wanted. More than those must not pile up while nobody reads."""
    path = str(clips.write_clip(tmp_path / "a.mp4", num_frames=300, size_px=(360, 640)))
    reader = DecordReader()
    probe = reader.probe(path)
    frames = reader.read(probe, range(20))
    assert clips.index_of(next(frames)) == 0
    before, sizes = resident_bytes(os.getpid()), []
    for _ in range(10):  # left to itself it takes half a second for all of them
        time.sleep(0.15)
        sizes.append(resident_bytes(os.getpid()))
    assert [clips.index_of(rgb) for rgb in frames] == [k % 256 for k in range(1, 20)]
    assert max(sizes) - before < 40_000_000, (before, sizes)


def test_frames_that_are_fetched_in_parts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (70, 64, 96, 3)).astype(np.uint8)
    path = str(clips.write_clip(tmp_path / "a.mp4", pictures=noise, bframes=3))
    indices = [0, 0, 1, 2, 28, 29, 30, 31, 31, 47, 59, 60, 61, 69]
    wanted = np.stack(list(PyavReader().read(PyavReader().probe(path), indices)))
    reader = DecordReader()
    probe = reader.probe(path)
    for num_at_once in (1, 3, 100):
        monkeypatch.setattr(decord_reader, "PART_BYTES", num_at_once * wanted[0].nbytes)
        assert np.array_equal(np.stack(list(reader.read(probe, indices))), wanted)
