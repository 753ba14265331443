"""A trace of the steps that were asked for, and of no other."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from vcr1_fast.run.telemetry import Telemetry


def names_in(path: Path) -> set[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def run_steps(folder: Path, first: int, last: int, profiled: tuple[int, int], rank: int = 0) -> None:
    telemetry = Telemetry(folder, rank, resume_step=first - 1, log_to=(), profile_steps=profiled)
    for step in range(first, last + 1):
        with telemetry.span(f"part_{step}"):
            torch.zeros(3) + step
        telemetry.log_step(step, {"reward": 0.0}, last)
    telemetry.close()


@pytest.mark.parametrize("first", [1, 2])  # 2: a run that goes on just before it
def test_spans_and_operators_of_the_steps_asked_for(tmp_path: Path, first: int, capsys: pytest.CaptureFixture[str]):
    run_steps(tmp_path, first, 4, (2, 3))
    path = tmp_path / "profile" / "steps_2-3_rank0.json.gz"
    assert {"part_2", "part_3", "aten::add"} <= names_in(path)
    assert not {"part_1", "part_4"} & names_in(path)
    assert f"profile of steps 2 to 3: {path}" in capsys.readouterr().out


def test_each_rank_writes_and_a_run_that_ends_before_leaves_what_it_did(tmp_path: Path):
    run_steps(tmp_path, 1, 2, (2, 9), rank=1)
    assert "part_2" in names_in(tmp_path / "profile" / "steps_2-9_rank1.json.gz")


def test_a_folder_that_cannot_be_written_is_said_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "profile").write_text("a file")
    run_steps(tmp_path, 1, 2, (1, 1))
    assert "cannot write the profile" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
