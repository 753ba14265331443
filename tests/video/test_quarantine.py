"""The quarantine file: appended at once, loaded by the next run, robust to a broken line."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from vcr1_fast.settings.config import ConfigError
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
    assert len(second.reasons) == 2


def test_broken_lines_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"source": "a", "reason": "x"}\n\n[1]\n{"source": 3, "reason": "x"}\n{"source": "b", "rea')
    with caplog.at_level(logging.WARNING):
        quarantine = Quarantine(path)
    assert len(quarantine.reasons) == 1
    assert [f"jsonl line {n} is not" in caplog.text for n in (1, 2, 3, 4, 5)] == [False, False, True, True, True]
    quarantine.add(SampleError("c", "y"))  # must not be glued to the unfinished last line
    assert "c" in Quarantine(path)


def test_a_further_list_is_honoured_and_left_alone(tmp_path: Path) -> None:
    own, further = tmp_path / "own.jsonl", tmp_path / "further.jsonl"
    Quarantine(further).add(SampleError("a.mp4", "is empty"))
    before = further.read_bytes()
    quarantine = Quarantine(own, further)
    assert "a.mp4" in quarantine and not own.exists()
    quarantine.add(SampleError("a.mp4", "is empty"))
    quarantine.add(SampleError("b.mp4", "is cut short"))
    assert further.read_bytes() == before
    assert list(Quarantine(own).reasons) == ["b.mp4"]
    with pytest.raises(ConfigError, match=r"data\.quarantine is .*gone\.jsonl, which is not there"):
        Quarantine(own, tmp_path / "gone.jsonl")


def test_on_retry_good_files_leave_the_list_and_bad_ones_stay_as_they_are(tmp_path: Path) -> None:
    own, further = tmp_path / "own.jsonl", tmp_path / "further.jsonl"
    Quarantine(further).add(SampleError("c.mp4", "is empty"))
    first = Quarantine(own)
    for name in ("a.mp4", "b.mp4", "d.mp4"):
        first.add(SampleError(name, "is empty"))
    own.write_bytes(own.read_bytes() + b"not json\n")
    lines = own.read_bytes().splitlines()
    os.chmod(own, 0o640)

    retry = Quarantine(own, further, retry=True)
    assert all(name not in retry for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"))
    retry.add(SampleError("a.mp4", "is empty"))  # still bad, for the same reason: its line is there
    assert "a.mp4" in retry and own.read_bytes().splitlines() == lines
    retry.forget(["c.mp4", "x.mp4"])  # of the other list, and of none
    assert own.read_bytes().splitlines() == lines
    retry.forget(["b.mp4", "a.mp4"])  # a.mp4 failed in this run: two examples of one file, one of them bad
    assert own.read_bytes().splitlines() == [lines[0], lines[2], lines[3]]
    retry.add(SampleError("d.mp4", "is cut short"))  # bad in another way: the later line counts
    assert Quarantine(own).reasons == {"a.mp4": "is empty", "d.mp4": "is cut short"}
    assert own.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["further.jsonl", "own.jsonl"]


def test_reasons_that_may_be_over_are_looked_at_again_and_the_start_says_so(tmp_path: Path) -> None:
    own, further = tmp_path / "own.jsonl", tmp_path / "further.jsonl"
    Quarantine(further).add(SampleError("f.mp4", "the file cannot be opened: [Errno 5] Input/output error"))
    first = Quarantine(own)
    assert first.describe() == ""
    first.add(SampleError("a.mp4", "no such file; check data.video_root and the annotation"))
    first.add(SampleError("b.mp4", "the file is empty (0 bytes); fetch it again"))
    first.add(SampleError("c", "the reward of task captioning raised JudgeUnavailableError: it is down"))
    assert "a.mp4" in first and "c" in first  # once in one run is enough
    lines = own.read_bytes()
    again = Quarantine(own, further)
    assert list(again.reasons) == ["b.mp4"]
    assert again.describe() == (
        "quarantine: 1 left out (1 empty), 3 looked at again (2 missing, 1 error); "
        "data.retry_quarantined=true looks at all of them again"
    )
    again.add(SampleError("a.mp4", "no such file; check data.video_root and the annotation"))
    assert "a.mp4" in again and own.read_bytes() == lines
    again.forget(["c"])
    assert Quarantine(own).describe().startswith("quarantine: 1 left out (1 empty), 1 looked at again (1 missing)")


def _append_and_forget(path: Path, writer: int) -> None:
    quarantine = Quarantine(path, retry=True)
    for i in range(30):
        quarantine.add(SampleError(f"{writer}-{i}.mp4", "x"))
        quarantine.forget([f"old-{writer}-{i}.mp4"])


def test_no_line_is_lost_when_one_process_rewrites_while_others_append(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path)
    for writer in range(3):
        for i in range(31):
            first.add(SampleError(f"old-{writer}-{i}.mp4", "y"))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_and_forget, args=(path, k)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    sources = [json.loads(line)["source"] for line in path.read_text().splitlines()]
    new = [f"{k}-{i}.mp4" for k in range(3) for i in range(30)]
    assert sorted(sources) == sorted([*new, "old-0-30.mp4", "old-1-30.mp4", "old-2-30.mp4"])


def test_the_summary_counts_reasons_and_names_the_first_files_of_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    rank_0, rank_1 = Quarantine(path), Quarantine(path)
    for k in range(4):
        rank_0.add(SampleError(f"a{k}.mp4", "the file is empty (0 bytes); fetch it again"))
    for k in range(3):
        rank_1.add(SampleError(f"b{k}.mp4", "no such file; check data.video_root and the annotation"))
    assert rank_0.summary() == "\n".join(
        [
            "7 files (4 empty, 3 missing):",
            *(f"  a{k}.mp4: the file is empty (0 bytes); fetch it again" for k in range(4)),
            "  b0.mp4: no such file; check data.video_root and the annotation",
            "  and 2 more",
        ]
    )
