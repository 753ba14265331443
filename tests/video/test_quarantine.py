"""The quarantine file: appended at once, loaded by the next run, robust to a broken line."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from vcr1_fast.types import SampleError
from vcr1_fast.video.quarantine import Quarantine


def test_entries_are_on_disk_at_once_and_known_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path)
    first.add(SampleError("a.mp4", "is empty"))
    first.add(SampleError("b.json:7", "no interval"))
    first.add(SampleError("a.mp4", "is still empty"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["source"], line["reason"]) for line in lines] == [("a.mp4", "is empty"), ("b.json:7", "no interval")]
    assert all(set(line) == {"source", "reason", "time"} for line in lines)
    second = Quarantine(path)
    assert "a.mp4" in second and "b.json:7" in second and "c.mp4" not in second
    assert second.num_bad == 2


def test_broken_lines_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"source": "a", "reason": "x"}\n\n[1]\n{"source": 3, "reason": "x"}\n{"source": "b", "rea')
    with caplog.at_level(logging.WARNING):
        quarantine = Quarantine(path)
    assert quarantine.num_bad == 1
    assert [f"jsonl line {n} is not" in caplog.text for n in (1, 2, 3, 4, 5)] == [False, False, True, True, True]
    quarantine.add(SampleError("c", "y"))  # must not be glued to the unfinished last line
    assert "c" in Quarantine(path)


def test_without_a_file_it_is_a_set() -> None:
    quarantine = Quarantine(None)
    quarantine.add(SampleError("a", "x"))
    assert "a" in quarantine and quarantine.num_bad == 1


def _append(path: Path, writer: int) -> None:
    quarantine = Quarantine(path)
    for i in range(50):
        quarantine.add(SampleError(f"{writer}-{i}.mp4", "x" * 2000))


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.touch()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, k)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    sources = [json.loads(line)["source"] for line in path.read_text().splitlines()]
    assert sorted(sources) == sorted(f"{k}-{i}.mp4" for k in range(3) for i in range(50))
