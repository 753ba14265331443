"""The cache gives back what was put, bit for bit, or nothing; and no file, disk or process can make it raise."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.video.cache_hammer import LARGE_BYTES, SMALL_BYTES, key_of, tensor_of
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video import cache_disk
from vcr1_fast.video.cache import (
    CACHE_FORMAT,
    FOLDER_FIELDS,
    IMAGE_FIELDS,
    PIXEL_FIELDS,
    TensorCache,
    clip_key,
    frames_entry,
    frames_of,
    tower_key,
)
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.resolution import frame_size_px, resize_frame
from vcr1_fast.video.sampling import choose_frames

HAMMER = Path(__file__).with_name("cache_hammer.py")
KEY = key_of(0)
CONFIG = VideoConfig()
BIG = 1 << 30
# Fields that say how a clip is read, or whether, but not what it looks like when it is.
OTHER_FIELDS = {
    "reader",  # its name and version are in the key
    "max_source_pixels",
    "timeout_s",
    "num_workers",
    "prefetch_steps",
    "clips_per_worker",
    "cache_dir",
    "cache_disk_gib",
    "cache_ram_gib",
}


@pytest.fixture(autouse=True)
def _ignore_how_full_this_disk_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_disk, "FREE_BYTES", 0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"only its size and its times count")
    return path


def changed(config: VideoConfig, name: str) -> VideoConfig:
    """`config` with another valid value in one field."""
    others = {
        "reader": "decord",
        "cache_dir": "elsewhere",
        "min_frames": 8,
        "max_frames": 32,
        "max_frame_pixels": 10**6,
    }
    value = others.get(name) or getattr(config, name) + 1
    return dataclasses.replace(config, **{name: value})


def entry_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put_values(cache: TensorCache, number: int, num_bytes: int = SMALL_BYTES) -> str:
    cache.put(key_of(number), {"values": tensor_of(number, num_bytes)}, {"number": str(number)})
    return key_of(number)


def test_each_field_of_the_settings_is_in_the_key_if_and_only_if_it_changes_the_frames(clip: Path, tmp_path: Path):
    """A new field fails here until someone has decided which kind it is."""
    names = {field.name for field in dataclasses.fields(VideoConfig)}
    assert {*PIXEL_FIELDS, *FOLDER_FIELDS, *IMAGE_FIELDS, *OTHER_FIELDS} == names
    folder = tmp_path / "images"
    folder.mkdir()
    for path, in_key in (
        (str(clip), {*PIXEL_FIELDS}),
        (str(folder), {*PIXEL_FIELDS, *FOLDER_FIELDS}),
        (f"{clip}#image", {*IMAGE_FIELDS}),
    ):
        plain = clip_key(ClipRequest.of(path, CONFIG), "pyav 1")
        differing = {n for n in names if clip_key(ClipRequest.of(path, changed(CONFIG, n)), "pyav 1") != plain}
        assert differing == in_key


def test_the_rules_that_a_key_does_not_spell_out_are_those_of_its_version():
    """When it fails on purpose, raise CACHE_FORMAT and enter what the new rules give: old clips are then read anew."""
    rules_of = {1: ("a164eaeca2115107", [159, 113, 124, 147, 126, 77, 105, 122, 101, 146, 97, 135, 105, 173, 133, 89])}
    chosen = []
    for num_frames, fps, size_px in ((90, 30.0, (64, 96)), (1, 25.0, (720, 1280)), (2400, 23.976, (1080, 607))):
        times_s = np.arange(num_frames) / fps
        for config in (CONFIG, dataclasses.replace(CONFIG, fps=0.7, max_frames=100, total_pixels=200 * 784)):
            choice = choose_frames(times_s, num_frames / fps, config)
            chosen.append((choice.indices, choice.sampled_fps, frame_size_px(*size_px, len(choice.indices), config)))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    pixels = resize_frame(image, 28, 56)[::9, ::17, 0].flatten().tolist()
    digest, wanted_pixels = rules_of[CACHE_FORMAT]
    assert hashlib.sha256(repr(chosen).encode()).hexdigest()[:16] == digest
    assert pixels == pytest.approx(wanted_pixels, abs=1)  # another processor may round the other way


def test_the_key_depends_on_file_part_reader_and_size_of_a_token(clip: Path, tmp_path: Path):
    def key(path: Path = clip, reader: str = "pyav 1", start_s: float = 0, end_s: float = math.inf) -> str:
        return clip_key(ClipRequest(str(path), CONFIG, start_s, end_s), reader)

    link = tmp_path / "link.mp4"
    link.symlink_to(clip)
    copy = Path(shutil.copy2(clip, tmp_path / "copy.mp4"))
    plain = key()
    assert key() == plain == key(link) and len(plain) == 40
    keys = {plain, key(copy), key(reader="pyav 2"), key(start_s=1), key(end_s=1), key(start_s=1, end_s=2)}
    keys.add(clip_key(ClipRequest(str(clip), CONFIG, factor_px=32), "pyav 1"))
    assert len(keys) == 7
    times = clip.stat()
    os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    keys.add(key())
    clip.write_bytes(clip.read_bytes() + b"!")
    os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(keys | {key()}) == 9


def test_the_key_of_a_folder_depends_on_each_file_in_it(tmp_path: Path):
    (tmp_path / "1.jpg").write_bytes(b"one")
    (tmp_path / "2.jpg").write_bytes(b"two")
    request = ClipRequest(str(tmp_path), CONFIG)
    keys = [clip_key(request, "images"), clip_key(request, "images")]
    (tmp_path / "2.jpg").write_bytes(b"three")
    keys.append(clip_key(request, "images"))
    (tmp_path / "2.jpg").rename(tmp_path / "3.jpg")
    keys.append(clip_key(request, "images"))
    os.utime(tmp_path / "1.jpg", ns=(0, 1))
    keys.append(clip_key(request, "images"))
    assert keys[0] == keys[1] and len(set(keys)) == 4


@pytest.mark.parametrize("name", ["missing.mp4", "a\0b.mp4", "clip.mp4/below.mp4"])
def test_the_key_of_a_file_that_cannot_be_opened_is_a_sample_error(clip: Path, name: str):
    path = str(clip.parent / name)
    with pytest.raises(SampleError) as raised:
        clip_key(ClipRequest(path, CONFIG), "pyav 1")
    assert raised.value.source == path


def test_the_key_of_a_tower_depends_on_clip_weights_and_type():
    keys = {
        tower_key(KEY, "weights", torch.bfloat16),
        tower_key(KEY, "weights", torch.float32),
        tower_key(KEY, "others", torch.bfloat16),
        tower_key(key_of(1), "weights", torch.bfloat16),
    }
    assert len(keys | {KEY}) == 5


def test_a_decoded_clip_comes_back_equal_from_memory_and_from_disk(tmp_path: Path):
    rgb_FHW3, times_s = torch.randint(0, 256, (4, 28, 56, 3), dtype=torch.uint8), torch.arange(4.0).double()
    frames = Frames(rgb_FHW3, times_s, 1 / 3, math.inf, "pyav 1")  # no text of fewer digits is exact
    entry = frames_entry(frames)
    first = TensorCache(tmp_path / "cache", BIG, BIG)
    assert first.get(KEY) is None
    first.put(KEY, dict(entry.tensors), dict(entry.metadata))
    for cache in (first, TensorCache(tmp_path / "cache", BIG, BIG)):
        found = cache.get(KEY)
        assert found is not None
        got = frames_of(found)
        for field in dataclasses.fields(Frames):
            value, wanted = getattr(got, field.name), getattr(frames, field.name)
            if isinstance(wanted, torch.Tensor):
                assert value.dtype == wanted.dtype and torch.equal(value, wanted)
            else:
                assert value == wanted


def test_tensors_of_every_type_and_shape_come_back_and_other_programs_can_read_the_file(tmp_path: Path):
    cache = TensorCache(tmp_path, 0, BIG)
    bits = torch.arange(-40, 40, dtype=torch.int8)
    tensors = {
        str(dtype): (torch.arange(6) % 2 == 1 if dtype == torch.bool else bits[:48].clone().view(dtype)).reshape(2, -1)
        for dtype in cache_disk.DTYPE_NAMES
    }
    tensors |= {
        "embeddings_MD": torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "odd": torch.arange(3, dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "part of more": torch.arange(100)[10:13],
    }
    metadata = {"crc32": "not the checksum", "format": "", "key": 'quotes " and \u00fc'}
    cache.put(KEY, tensors, metadata)
    entry = cache.get(KEY)
    assert entry is not None and entry.metadata == metadata
    by_library = safetensors.torch.load_file(entry_path(tmp_path, KEY))
    assert set(entry.tensors) == set(tensors) == set(by_library)
    for name, wanted in tensors.items():
        for got in (entry.tensors[name], by_library[name]):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            raw, wanted_raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got, wanted))
            assert torch.equal(raw, wanted_raw), name  # bits, because NaN is among them


def test_memory_gives_the_same_tensor_and_keeps_no_more_than_it_needs():
    cache = TensorCache(None, BIG, 0)
    whole, large = torch.arange(10), torch.arange(1000)
    cache.put(KEY, {"whole": whole, "part": large[:10]}, {})
    first, second = cache.get(KEY), cache.get(KEY)
    assert first is not None and first is second
    assert first.tensors["whole"].data_ptr() == whole.data_ptr()
    assert first.tensors["part"].untyped_storage().nbytes() == 80
    assert cache.metrics()["cache/ram_bytes"] == 160


def test_memory_drops_what_was_used_longest_ago():
    cache = TensorCache(None, 3 * 80, 0)
    for number in (1, 2, 3):
        cache.put(key_of(number), {"values": torch.full((10,), number)}, {})
    assert cache.get(key_of(1)) is not None
    cache.put(key_of(4), {"values": torch.full((10,), 4)}, {})
    cache.put(key_of(4), {"values": torch.full((10,), 4)}, {})  # again: counts once
    cache.put(key_of(5), {"values": torch.zeros(31)}, {})  # 124 bytes: the two oldest go
    assert [number for number in range(1, 6) if cache.get(key_of(number)) is not None] == [4, 5]
    cache.put(key_of(6), {"values": torch.zeros(61)}, {})  # 244 bytes: more than the budget
    metrics = cache.metrics()
    assert cache.get(key_of(6)) is None
    assert (metrics["cache/ram_bytes"], metrics["cache/ram_entries"], metrics["cache/ram_evicted"]) == (204, 2, 3)
    cache.close()
    assert cache.get(key_of(4)) is None and cache.metrics()["cache/ram_bytes"] == 0


def test_metrics_count_each_tier(tmp_path: Path):
    cache = TensorCache(tmp_path, BIG, BIG)
    key = put_values(cache, 1)
    put_values(TensorCache(tmp_path, 0, BIG), 2)  # another process
    for wanted in (key, key, key_of(2), key_of(2), key_of(3)):  # 3 from memory, 1 from disk, 1 nowhere
        cache.get(wanted)
    metrics = cache.metrics()
    assert metrics["cache/hit_rate"] == 4 / 5
    assert metrics["cache/ram_hit_rate"] == 3 / 5
    assert metrics["cache/disk_hit_rate"] == 1 / 2
    assert metrics["cache/misses"] == 1
    assert metrics["cache/healed"] == metrics["cache/disk_evicted"] == metrics["cache/disk_is_off"] == 0
    assert metrics["cache/disk_bytes"] == entry_path(tmp_path, key).stat().st_size
    assert all(isinstance(value, float) for value in metrics.values())
    assert "cache/disk_hit_rate" not in TensorCache(None, BIG, BIG).metrics()
    assert "cache/ram_hit_rate" not in TensorCache(tmp_path, 0, BIG).metrics()


def test_an_entry_with_any_byte_changed_or_missing_is_removed_and_counted(tmp_path: Path):
    cache = TensorCache(tmp_path, 0, BIG)
    cache.put(KEY, {"rgb": torch.arange(9, dtype=torch.uint8), "times_s": torch.arange(2.0)}, {"reader": "pyav 1"})
    path = entry_path(tmp_path, KEY)
    sound = path.read_bytes()
    damaged = [sound[:at] + bytes([sound[at] ^ (1 << at % 8)]) + sound[at + 1 :] for at in range(len(sound))]
    damaged += [sound[:length] for length in range(len(sound))] + [sound + b"\0", b"\xff" * 500]
    for number, raw in enumerate(damaged, start=1):
        path.write_bytes(raw)
        assert cache.get(KEY) is None
        assert not path.exists()
        assert cache.metrics()["cache/healed"] == number
    path.write_bytes(sound)
    assert cache.get(KEY) is not None
    assert cache.metrics()["cache/healed"] == len(damaged)


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"rgb": torch.zeros(4)}, path, metadata={"crc32": "00000000"})


def of_another_key(path: Path) -> None:
    os.replace(entry_path(path.parents[1], put_values(TensorCache(path.parents[1], 0, BIG), 1)), path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def of_a_huge_header(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + cache_disk.HEAD + bytes(1000))


def nested_too_deep(path: Path) -> None:
    header = cache_disk.HEAD + b'00000000","format":' + b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


NOT_AN_ENTRY = (
    foreign,
    of_another_key,
    endless,
    a_pipe,
    of_a_huge_header,
    nested_too_deep,
    a_loop,
)


@pytest.mark.parametrize("make", NOT_AN_ENTRY)
def test_a_file_that_is_no_entry_of_this_key_is_removed_and_counted(tmp_path: Path, make: Callable[[Path], None]):
    path = entry_path(tmp_path, KEY)
    path.parent.mkdir()
    make(path)
    assert os.path.lexists(path)
    cache = TensorCache(tmp_path, 0, BIG)
    assert cache.get(KEY) is None
    assert not os.path.lexists(path)
    assert cache.metrics()["cache/healed"] == 1
    cache.put(KEY, {"values": torch.zeros(3)}, {})
    assert cache.get(KEY) is not None


def test_a_file_that_grew_is_removed_before_memory_is_taken_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cache = TensorCache(tmp_path, 0, BIG)
    put_values(cache, 0)
    os.truncate(entry_path(tmp_path, KEY), 1 << 42)
    assert cache.get(KEY) is None
    assert f"bytes of data, wanted {SMALL_BYTES}" in caplog.text
    assert not entry_path(tmp_path, KEY).exists()


def test_a_folder_in_the_place_of_an_entry_is_left_alone(tmp_path: Path):
    entry_path(tmp_path, KEY).mkdir(parents=True)
    cache = TensorCache(tmp_path, 0, BIG)
    assert cache.get(KEY) is None
    put_values(cache, 0)
    assert cache.get(KEY) is None
    assert cache.metrics()["cache/disk_is_off"] == 0


def test_a_machine_without_free_file_descriptors_costs_no_entry(tmp_path: Path):
    cache = TensorCache(tmp_path, 0, BIG)
    put_values(cache, 0)
    cache.get(KEY)  # what is imported late is imported now
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        found = cache.get(KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found is None
    assert cache.get(KEY) is not None and cache.metrics()["cache/healed"] == 0


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond it fails in the middle of a file, as on a full disk. (Python ignores the signal.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_turns_writing_off_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cache = TensorCache(tmp_path, BIG, BIG)
    put_values(cache, 1)
    before = stored_bytes(tmp_path)
    with files_of_at_most(20_000), caplog.at_level(logging.WARNING):
        put_values(cache, 2)
        put_values(cache, 3)
    put_values(cache, 4)
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text
    assert cache.metrics()["cache/disk_is_off"] == 1
    assert stored_bytes(tmp_path) == before and not list((tmp_path / "tmp").iterdir())
    assert cache.get(key_of(4)) is not None  # memory goes on
    fresh = TensorCache(tmp_path, 0, BIG)
    assert [number for number in range(1, 5) if fresh.get(key_of(number)) is not None] == [1]


def test_a_folder_that_cannot_be_made_leaves_the_memory(clip: Path, caplog: pytest.LogCaptureFixture):
    cache = TensorCache(clip / "cache", BIG, BIG)  # below a file
    put_values(cache, 1)
    assert cache.get(key_of(1)) is not None and cache.get(key_of(2)) is None
    assert len(caplog.records) == 1 and cache.metrics()["cache/healed"] == 0


def test_a_read_only_folder_is_read(caplog: pytest.LogCaptureFixture):
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies below folders that are closed to others
        folder, is_root = Path(name), os.geteuid() == 0
        put_values(TensorCache(folder, 0, BIG), 1)
        paths = [folder, *folder.rglob("*")]
        os.utime(entry_path(folder, key_of(1)), (0, 0))
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if is_root:
            os.seteuid(65534)  # permissions do not bind root
        try:
            cache = TensorCache(folder, 0, BIG)
            found, _ = cache.get(key_of(1)), (put_values(cache, 2), put_values(cache, 3))
        finally:
            if is_root:
                os.seteuid(0)
            for path in paths:
                path.chmod(0o755)
    assert found is not None and torch.equal(found.tensors["values"], tensor_of(1))
    assert len(caplog.records) == 1 and "nothing more is stored" in caplog.text
    assert cache.metrics()["cache/healed"] == 0


def test_the_disk_drops_what_was_used_longest_ago_and_touches_nothing_else(tmp_path: Path):
    notes = tmp_path / "ab" / "notes.safetensors"
    notes.parent.mkdir()
    notes.write_bytes(b"mine" * 100_000)
    left_behind, in_work = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    left_behind.parent.mkdir()
    left_behind.write_bytes(b"half")
    in_work.write_bytes(b"half")
    os.utime(left_behind, (1000, time.time() - 3601))
    cache = TensorCache(tmp_path, 0, 10 * SMALL_BYTES)
    for number in range(9):  # with headers 9 entries are 91 % of the budget
        path = entry_path(tmp_path, put_values(cache, number))
        os.utime(path, (1000 + number, 1000 + number))
    assert cache.metrics()["cache/disk_evicted"] == 0
    assert not left_behind.exists() and in_work.exists()
    for number in (0, 1):
        assert cache.get(key_of(number)) is not None  # used again: now the newest
    put_values(cache, 9)  # 10 are over 95 %: down to 8
    kept = [number for number in range(10) if entry_path(tmp_path, key_of(number)).exists()]
    assert kept == [0, 1, 4, 5, 6, 7, 8, 9]
    metrics = cache.metrics()
    assert metrics["cache/disk_evicted"] == 2
    sizes = sum(entry_path(tmp_path, key_of(number)).stat().st_size for number in kept) + in_work.stat().st_size
    assert metrics["cache/disk_bytes"] == sizes
    assert notes.exists()


def test_one_process_drops_while_the_others_go_on(tmp_path: Path):
    cache = TensorCache(tmp_path, 0, 4 * SMALL_BYTES)
    with open(tmp_path / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for number in range(8):
            put_values(cache, number)
        assert len(list(tmp_path.glob("??/*"))) == 8
    put_values(cache, 8)
    assert len(list(tmp_path.glob("??/*"))) == 3


def test_what_others_write_while_one_drops_is_seen_without_a_further_write(tmp_path: Path, monkeypatch):
    """The other neither waits nor writes again; without its mark the folder stayed at 9 entries, over room for 3."""
    tier, other = cache_disk.DiskTier(tmp_path, 4 * SMALL_BYTES), TensorCache(tmp_path, 0, 4 * SMALL_BYTES)
    entries, looks = tier._entries, []

    def listed_late():
        found = list(entries())
        if not looks:
            for number in range(9):
                put_values(other, number)
        looks.append(len(found))
        return iter(found)

    monkeypatch.setattr(tier, "_entries", listed_late)
    tier.make_room()
    assert looks == [0, 9]
    assert len(list(tmp_path.glob("??/*"))) == 3


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = TensorCache(tmp_path, 0, 4 * SMALL_BYTES)
    for number in range(8):
        put_values(cache, number)
    assert len(list(tmp_path.glob("??/*"))) == 3
    assert cache.metrics()["cache/disk_is_off"] == 0


def test_a_disk_that_others_fill_is_left_some_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = TensorCache(tmp_path, 0, BIG)
    for number in range(10):
        put_values(cache, number)
        os.utime(entry_path(tmp_path, key_of(number)), (1000 + number, 1000 + number))
    used = stored_bytes(tmp_path)
    monkeypatch.setattr(cache_disk, "FREE_BYTES", used // 2 + 10**9)
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(total=10**12, free=10**9))
    cache_disk.DiskTier(tmp_path, BIG).make_room()  # half of what is used is too much: 85 % of the other half stays
    assert [number for number in range(10) if cache.get(key_of(number)) is not None] == [6, 7, 8, 9]


def test_the_time_of_use_is_written_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = TensorCache(tmp_path, BIG, BIG)
    path = entry_path(tmp_path, put_values(cache, 1))
    reader = TensorCache(tmp_path, 0, BIG)
    recent = time.time() - 50
    os.utime(path, (recent, recent))
    reader.get(key_of(1))
    assert path.stat().st_mtime == pytest.approx(recent, abs=1e-3)
    os.utime(path, (recent - 20, recent - 20))
    reader.get(key_of(1))
    assert path.stat().st_mtime >= recent + 49
    os.utime(path, (1000, 1000))
    cache.get(key_of(1))  # from memory, less than a minute after it was put
    assert path.stat().st_mtime == 1000
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    cache.get(key_of(1))
    assert path.stat().st_mtime > 1000


def test_an_entry_larger_than_the_disk_budget_is_not_written(tmp_path: Path):
    cache = TensorCache(tmp_path, BIG, SMALL_BYTES)
    put_values(cache, 1)
    assert stored_bytes(tmp_path) == 0 and cache.get(key_of(1)) is not None


def test_threads_share_one_cache(tmp_path: Path):
    cache = TensorCache(tmp_path, 8 * SMALL_BYTES, 20 * SMALL_BYTES)
    wanted = [tensor_of(number) for number in range(30)]
    problems = []

    def work(seed: int) -> None:
        for step in range(150):
            number = (seed * 7 + step * (seed + 1)) % 30
            entry = cache.get(key_of(number))
            if entry is None:
                cache.put(key_of(number), {"values": wanted[number]}, {})
            elif not torch.equal(entry.tensors["values"], wanted[number]):
                problems.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = cache.metrics()
    assert problems == []
    assert metrics["cache/ram_bytes"] <= 8 * SMALL_BYTES
    assert metrics["cache/healed"] == metrics["cache/disk_is_off"] == 0
    assert round(900 * metrics["cache/hit_rate"]) == 900 - metrics["cache/misses"]


def run_hammer(*arguments: object) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }
    command = [sys.executable, str(HAMMER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_four_processes_write_and_drop_in_one_folder(tmp_path: Path):
    """60 entries over room for 20: many lookups miss, and each miss writes and may drop.

    How many depends on who runs when: while one process drops entries the others go on writing.
    """
    budget = 20 * SMALL_BYTES
    process = run_hammer(tmp_path, budget, 4, 400)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    reports = [json.loads(line) for line in output.splitlines()]
    assert len(reports) == 4
    for report in reports:
        assert (report["wrong"], report["cache/healed"], report["cache/disk_is_off"]) == (0, 0, 0)
        assert report["cache/hit_rate"] > 0.1
    assert sum(report["cache/misses"] for report in reports) >= 60  # whoever comes first to an entry; one may never be
    assert sum(report["cache/disk_evicted"] for report in reports) > 40  # all that does not fit, and more
    assert stored_bytes(tmp_path) <= 0.95 * budget + 4 * (budget / 128 + 2 * SMALL_BYTES)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_process_killed_while_it_writes_leaves_no_damage(tmp_path: Path):
    temporaries, budget = tmp_path / "tmp", 4 * LARGE_BYTES
    for _ in range(10):  # a kill may fall between two writes
        process = run_hammer(tmp_path, budget)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (temporaries.exists() and list(temporaries.iterdir())):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if list(temporaries.iterdir()):
            break
    [left] = temporaries.iterdir()
    cache = TensorCache(tmp_path, 0, budget)
    found = [cache.get(path.stem) for path in tmp_path.glob("??/*.safetensors")]
    assert all(entry is not None and torch.equal(entry.tensors["values"], tensor_of(0, LARGE_BYTES)) for entry in found)
    assert cache.get(left.name.split(".")[0]) is None
    put_values(cache, 1)
    assert left.exists()  # its process may still be writing
    os.utime(left, (1000, time.time() - 3601))
    put_values(TensorCache(tmp_path, 0, budget), 2)
    assert not left.exists()
    assert cache.metrics()["cache/healed"] == 0


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back_on_the_cpu(tmp_path: Path):
    values_MD = torch.randn(37, 64, device="cuda").bfloat16()
    cache = TensorCache(tmp_path, BIG, BIG)
    cache.put(KEY, {"embeddings_MD": values_MD}, {})
    for found in (cache.get(KEY), TensorCache(tmp_path, 0, BIG).get(KEY)):
        assert found is not None and torch.equal(found.tensors["embeddings_MD"], values_MD.cpu())
