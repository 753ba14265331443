"""What a run writes and prints: names, resume, NaN, silence of other ranks."""

import io
import json
import math
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vcr1_fast.run.telemetry as telemetry_module
from vcr1_fast.run.telemetry import Telemetry, keep_steps_up_to, progress, say, to_json


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_one_flushed_json_line_and_tensorboard_scalars(tmp_path: Path, capsys):
    telemetry = Telemetry(tmp_path)
    with telemetry.span("rollout"):
        time.sleep(0.05)
    with telemetry.span("rollout"):
        time.sleep(0.05)
    telemetry.log_step(1, {"reward": 0.5, "kl": math.nan, "step_tokens/executed": 1000.0}, num_steps=2)
    [record] = records(tmp_path)  # before close: flushed
    assert record["step"] == 1 and record["reward"] == 0.5 and record["kl"] is None
    assert 0.1 <= record["time/rollout_s"] <= record["step_time"]
    assert record["tokens_per_s/executed"] == pytest.approx(1000.0 / record["step_time"])
    telemetry.log_step(2, {"reward": 1.0}, num_steps=2)
    assert "time/rollout_s" not in records(tmp_path)[1]  # spans start anew each step
    telemetry.close()
    assert capsys.readouterr().out.count("\n") == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5), (2, 1.0)]
    assert "kl" not in events.Tags()["scalars"]


def test_time_between_steps_is_not_the_next_steps(tmp_path: Path):
    telemetry = Telemetry(tmp_path)
    with telemetry.span("eval"):
        time.sleep(0.2)
    telemetry.log_step(1, {}, num_steps=1)
    [record] = records(tmp_path)
    assert record["time/eval_s"] >= 0.2
    assert 0 <= record["step_time"] < 0.2


def test_a_span_counts_when_its_block_raises(tmp_path: Path):
    telemetry = Telemetry(tmp_path)
    with pytest.raises(ZeroDivisionError), telemetry.span("update"):
        _ = 1 / 0
    telemetry.log_step(1, {}, num_steps=1)
    assert records(tmp_path)[0]["time/update_s"] >= 0


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path):
    first = Telemetry(tmp_path)
    for step in (1, 2, 3):
        first.log_step(step, {"reward": float(step)}, num_steps=4)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    damaged = b'{"id": "a", "step": 2}\n{"id": "a", "st\xb1p": 1}\n{"id": "a", "step": 3}\n{"id": "b", "st'
    (tmp_path / "rewards.jsonl").write_bytes(damaged)
    (tmp_path / "samples").mkdir()
    for step in (2, 3):
        (tmp_path / "samples" / f"step_{step}.jsonl").touch()
    second = Telemetry(tmp_path, resume_step=2)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_2.jsonl"]
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert (tmp_path / "rewards.jsonl").read_text() == '{"id": "a", "step": 2}\n'
    second.log_step(3, {"reward": 30.0}, num_steps=4)
    second.close()
    assert [(record["step"], record["reward"]) for record in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_run_in_an_old_folder_starts_with_an_empty_record(tmp_path: Path):
    first = Telemetry(tmp_path)
    first.log_eval(0, {"miou": 0.4})
    first.close()
    second = Telemetry(tmp_path)
    second.log_eval(0, {"miou": 0.5})
    second.close()
    assert records(tmp_path) == [{"step": 0, "eval/miou": 0.5}]


def test_keep_steps_of_a_folder_without_metrics(tmp_path: Path):
    keep_steps_up_to(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_and_print_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    telemetry = Telemetry(tmp_path / "run", rank=1)
    with telemetry.span("rollout"):
        pass
    telemetry.log_step(1, {"reward": 1.0}, num_steps=1)
    telemetry.log_eval(1, {"miou": 1.0})
    telemetry.close()
    say("hello")
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_json_is_strict():
    line = to_json({"a": [math.inf, 1.5], "b": (math.nan,), "c": Path("x"), 3: None})
    assert json.loads(line, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": [None], "c": "x", "3": None}


def test_unwritable_folder_is_an_oserror(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Telemetry(tmp_path / "file" / "run")


def test_progress_without_a_terminal_prints_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))  # each look is 4 s later: 12 s after the start, then 16 and 28
    monkeypatch.setattr(telemetry_module.time, "monotonic", lambda: float(next(clock)))
    assert list(progress([1, 2, 3, 4, 5, 6], "decode")) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == "decode: 3 of 6\ndecode: 6 of 6\n"


def test_progress_that_is_quick_prints_nothing_without_a_terminal(capsys):
    assert list(progress(iter("abc"), "decode")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_progress_on_a_terminal_survives_a_bar_in_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(telemetry_module, "console", Console(file=screen, force_terminal=True, width=80))
    seen = [(a, b) for a in progress([1, 2], "outer") for b in progress([3, 4], "inner")]
    assert seen == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert "outer" in screen.getvalue() and "inner" not in screen.getvalue()
    assert list(progress([5], "again")) == [5]
    assert "again" in screen.getvalue()
