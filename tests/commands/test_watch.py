"""`vcr1-fast watch`: the table of a run, and that it follows one that is written meanwhile."""

import json
import threading
import time
from pathlib import Path

import pytest

from vcr1_fast import cli
from vcr1_fast.commands import watch
from vcr1_fast.commands.watch import RunRecord, curve, watch_command


def write(folder: Path, steps: range, num_steps: int = 4, mode: str = "a", **more: object) -> None:
    (folder / "config.yaml").write_text(f"train: {{num_steps: {num_steps}}}\nsft: {{num_steps: 9}}\n")
    with (folder / "metrics.jsonl").open(mode) as file:
        for step in steps:
            record = {"step": step, "reward": step / 10, "step_time": 2.0, "video/crashes": 0.0, "kl": None} | more
            file.write(json.dumps(record) + "\n")


def test_the_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path, range(1, 13), num_steps=20)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 12, "eval/t/miou": 0.25}\n{"step": 13, "rew')
    with pytest.raises(SystemExit) as ended:
        cli.main(["watch", str(tmp_path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "step 12 of 20, 0:16 left" in out.replace("\n", "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 4}
    assert rows["reward"] == ["1.2", "0.75", curve([step / 10 for step in range(1, 13)])]
    assert rows["eval/t/miou"][:2] == ["0.25", "0.25"]
    assert "video/crashes" not in out and "kl" not in rows
    assert max(map(len, out.splitlines())) <= 80 or str(tmp_path) in out.splitlines()[0]
    with pytest.raises(SystemExit):
        cli.main(["watch", str(tmp_path), "--all"])
    assert "video/crashes" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["watch", str(tmp_path)])
    assert ended.value.code == 1 and "give the folder of a run" in capsys.readouterr().err


def test_it_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_LOOKS", 0.01)
    write(tmp_path, range(1, 3), **{"eval/t/miou": 0.1})

    def go_on() -> None:
        time.sleep(0.1)
        write(tmp_path, range(3, 5))
        time.sleep(0.1)
        (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "eval/t/miou": 0.3}\n')

    trainer = threading.Thread(target=go_on)
    trainer.start()
    watch_command(str(tmp_path), shows_all=False, follows=True)
    trainer.join()
    run = RunRecord(tmp_path)
    run.read_on()
    assert run.has_ended() and run.step == 4


def test_a_resumed_run_begins_its_file_anew(tmp_path: Path):
    write(tmp_path, range(1, 4))
    run = RunRecord(tmp_path)
    run.read_on()
    write(tmp_path, range(1, 2), mode="w")
    run.read_on()
    write(tmp_path, range(2, 3))
    run.read_on()
    assert [record["step"] for record in run.records] == [1, 2]


def test_supervised_training_has_its_own_number_of_steps(tmp_path: Path):
    write(tmp_path, range(1, 3), nll=1.0)
    run = RunRecord(tmp_path)
    run.read_on()
    assert run.num_steps() == 9


def test_a_curve_goes_from_the_lowest_to_the_highest():
    assert curve([0.0, 1.0, 2.0, 7.0], 10) == "▁▂▃█"
    assert curve([5.0, 5.0], 10) == "▁▁"
    assert curve([0.0, 2.0, 7.0, 7.0], 2) == "▁█"  # means of neighbours: 1 and 7
