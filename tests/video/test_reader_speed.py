"""Which reader is fastest for some clips: by real readers in real workers, and the rule by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.video import clips, injected_readers
from tests.video.torchcodec_process import link_libraries
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.video import dali_codecs, reader_speed
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.reader_speed import Speed, fastest, measure_readers

ONE_WORKER = VideoConfig(num_workers=1)


def requests(paths: list[Path], config: VideoConfig = ONE_WORKER) -> list[ClipRequest]:
    return [ClipRequest(str(path), config) for path in paths]


def test_real_readers_read_the_clips_and_say_how_long_that_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in processes of its own: torchcodec finds FFmpeg's libraries there, and does not without them."""
    paths = [clips.write_clip(tmp_path / f"{k}.mp4", num_frames=20) for k in range(3)]
    (tmp_path / "cut.mp4").write_bytes(paths[0].read_bytes()[:2000])
    folder = tmp_path / "libraries"
    folder.mkdir()
    libraries = link_libraries(folder)
    readers: list[ReaderName] = ["pyav", "decord", "torchcodec+pyav"]
    if libraries is not None:
        monkeypatch.setenv("LD_LIBRARY_PATH", f"{folder}:{libraries}")
    if dali_codecs.version() is not None:
        readers.append("dali+pyav")
    monkeypatch.setattr(reader_speed, "LIMIT_S", 240.0)  # all is read
    speeds = measure_readers(readers, requests([*paths, tmp_path / "cut.mp4"]), sorted(os.sched_getaffinity(0)))
    assert [speed.reader for speed in speeds] == readers
    wanted = {str(path) for path in paths}
    for speed in speeds:
        if speed.num_processes == 0:
            assert speed.reader == "torchcodec+pyav" and libraries is None and "does not load" in speed.name
            continue
        assert speed.name.split()[0] == speed.reader.split("+")[0] and speed.num_processes == 1
        assert {clip.path for clip in speed.read_s} == wanted and min(speed.read_s.values()) > 0
    best, by_clips = fastest(speeds)
    usable = [speed.clip_s(by_clips) for speed in speeds if speed.num_processes]
    assert len(by_clips) == 3 and 0.8 * best.clip_s(by_clips) <= min(usable)


def test_a_slow_reader_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it reads on the cores that it may have."""
    monkeypatch.setattr(reader_speed, "open_reader", injected_readers.on_its_cores)
    monkeypatch.setattr(reader_speed, "LIMIT_S", 1.0)
    core = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    paths = [tmp_path / name for name in ("1.mp4", "2long.mp4")]
    [speed] = measure_readers(["pyav"], requests(paths), [core])
    assert [Path(clip.path).stem for clip in speed.read_s] == ["1"] and speed.num_processes == 1
    assert (tmp_path / "cores.txt").read_text() == f"{[core]}\n" * 2
    assert os.sched_getaffinity(0) == before


def test_a_reader_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reader_speed, "open_reader", injected_readers.failing_in_workers)
    speeds = measure_readers(["pyav"], requests([tmp_path / "1.mp4"]), sorted(os.sched_getaffinity(0)))
    assert speeds[0].num_processes == 0 and "no such decoder here" in speeds[0].name
    with pytest.raises(ReaderError, match=r"no reader works here \(pyav: .*no such decoder here.*\): install one"):
        fastest(speeds)


def test_the_first_is_taken_unless_a_later_one_is_clearly_faster() -> None:
    one, two, three = clips_ = requests([Path("/1"), Path("/2"), Path("/3")])

    def speed(reader: ReaderName, seconds: tuple[float, ...], num_processes: int = 1) -> Speed:
        return Speed(reader, reader, num_processes, dict(zip(clips_, seconds, strict=False)))

    dali, pyav = speed("dali+pyav", (1.0, 3.0), 2), speed("pyav", (2.0, 2.0, 9.0), 2)
    assert dali.clip_s([one, two]) == 1.0  # 4 s of 2 clips by 2 processes
    assert fastest([dali, pyav]) == (dali, [one, two]) and fastest([pyav, dali]) == (pyav, [one, two])
    assert fastest([dali, speed("pyav", (3.5, 3.5), 4)])[0] is dali  # 0.875 s: less by less than a fifth
    assert fastest([dali, speed("pyav", (3.1, 3.1), 4)])[0].reader == "pyav"  # 0.775 s
    # clip 3 alone would say the contrary, but only one of them read it
    assert fastest([speed("dali+pyav", (1.0, 1.0, 99.0)), speed("pyav", (2.0, 2.0))])[0].reader == "dali+pyav"
    none = speed("dali+pyav", ())
    assert fastest([none, pyav]) == (pyav, [one, two, three]) and fastest([none, speed("pyav", ())])[0] is none
    assert fastest([speed("dali+pyav", (), 0), pyav])[0] is pyav


def test_files_are_brought_into_memory_for_a_limited_time(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("gone.mp4", "b.mp4", "b.mp4")]
    paths[1].write_bytes(b"x")
    gone, there, _ = requests(paths)
    assert reader_speed._warmed([gone, there, there], 60.0) == [gone, there]
    started = time.monotonic()
    assert reader_speed._warmed([gone, there], -1.0) == [gone] and time.monotonic() - started < 10
