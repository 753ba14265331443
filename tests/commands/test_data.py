"""`vcr1-fast data`: what is counted as found, missing and refused, and the exit code that a script sees."""

import json
from pathlib import Path
from typing import Any

import pytest

import vcr1_fast.cli as cli
from vcr1_fast.commands.data import is_there

ROW = {"task": "temporal_grounding", "query": "a dog barks", "duration_s": 8.0, "intervals": [[1.0, 3.0]]}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[object, str, dict[str, Any]]:
    with pytest.raises(SystemExit) as end:
        cli.main(["data", *tokens])
    *told, line = capsys.readouterr().out.splitlines()
    return end.value.code, " ".join(" ".join(told).split()), json.loads(line)


def test_found_and_missing_are_counted_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two of three videos are here, one of them asked about twice; the last row has no query."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    train = write(tmp_path / "train.jsonl", {"video": "a.mp4"}, {"video": "a.mp4"}, {"video": "c"}, {"query": ""})
    held_out = write(tmp_path / "eval.jsonl", {"video": "b.mp4"})
    code, told, line = run(capsys, f"--data.train=[{train}]", f"--data.eval=[{held_out}, {tmp_path}/none.json]")
    assert code == 1
    counts = [(f["num_rows"], f["num_examples"], f["videos_found"], f["videos_missing"]) for f in line["files"]]
    assert counts == [(4, 3, 1, 1), (1, 1, 1, 0), (0, 0, 0, 0)]
    assert [f["problem"] for f in line["files"]] == ["", "", "no such file"]
    assert f"1 videos or images are missing, such as {tmp_path}/c.mp4" in told
    assert "data.video_root is the folder" in told and "docs/data.md" in told
    assert "1 rows cannot be used, such as" in told


def test_a_complete_set_ends_with_0_and_folders_of_images_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "1.jpg").write_bytes(b"x")
    rows = write(tmp_path / "rows.jsonl", {"video": f"{tmp_path}/clip#images=7&fps=2"})
    code, _, line = run(capsys, f"--data.train=[{rows}]")
    assert (code, line["files"][0]["videos_found"], line["files"][0]["videos_missing"]) == (0, 1, 0)


def test_what_is_empty_is_not_there(tmp_path: Path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "folder").mkdir()
    assert [is_there(str(tmp_path / name)) for name in ("a.mp4", "folder", "none", "a\0b")] == [False] * 4


def test_settings_without_a_file_say_which_setting_names_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["data"])
    assert end.value.code == 1 and "--data.train=" in capsys.readouterr().err


def test_a_file_of_both_is_looked_at_once_and_one_named_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = write(tmp_path / "rows.jsonl", {"video": "a.mp4"})
    code, _, line = run(capsys, f"--data.train=[{rows}]", f"--data.eval=[{rows}]")
    assert (code, len(line["files"])) == (0, 1)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", f"--data.train=[{rows}, {rows}]"])
    assert end.value.code == 1 and f"data.train names {rows} twice" in capsys.readouterr().err


def test_a_file_that_is_broken_as_a_whole_is_told_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = write(tmp_path / "rows.jsonl", {"video": "a.mp4"})
    code, _, line = run(capsys, f"--data.train=[{tmp_path}/broken.json, {rows}]")
    assert code == 1 and "broken.json" in line["files"][0]["problem"] and line["files"][1]["num_examples"] == 1
