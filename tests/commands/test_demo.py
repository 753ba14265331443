"""`make demo`: what it runs, and what it ends with in a pipe and on a terminal."""

import io
import json
from pathlib import Path

import pytest

import vcr1_fast.synth.dataset
import vcr1_fast.train
from vcr1_fast.commands import demo
from vcr1_fast.run.terminal import console

SCORE = {"metrics": {"miou": 0.49123}, "trivial": {"middle": {"miou": 0.36}, "whole": {"miou": 0.25}}}
LEARNED = SCORE | {"metrics": {"miou": 0.875}}
RESULT = {"before": {"temporal_grounding": SCORE}, "after": {"temporal_grounding": LEARNED}}


@pytest.fixture
def ended(monkeypatch, tmp_path: Path):
    """ended(arguments): the exit code of the demo whose training is over at once."""
    monkeypatch.setattr(vcr1_fast.synth.dataset, "write_dataset", lambda config: None)
    monkeypatch.setattr(vcr1_fast.train, "train", lambda config: RESULT | {"run": config.train.output_dir})
    monkeypatch.setattr("sys.argv", ["demo", "--folder", str(tmp_path)])

    def end() -> object:
        with pytest.raises(SystemExit) as done:
            demo.main()
        return done.value.code

    return end


def test_in_a_pipe_the_last_line_is_json(ended, capsys, tmp_path):
    assert ended() == 0
    *others, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["tasks"] == {"temporal_grounding": {"before": 0.4912, "after": 0.875, "trivial": 0.36}}
    assert json.loads(last)["run"] == str(tmp_path / "run")
    assert others[-2].endswith(f": file://{tmp_path}/run/report.html") and "vcr1-fast watch" in others[-1]


def test_on_a_terminal_it_is_a_table(ended, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_file", screen)
    assert ended() == 0
    text = screen.getvalue()
    row = next(line for line in text.splitlines() if line.strip().startswith("temporal_grounding"))
    assert row.split() == ["temporal_grounding", "0.491", "0.875", "0.360"]
    assert "{" not in text and "/run/report.html" in text


def test_full_is_the_packaged_settings_and_the_rest_a_part_of_them(tmp_path):
    (synth, config), (all_clips, full) = (demo.settings(tmp_path, 3, is_full) for is_full in (False, True))
    assert (synth.num_train, synth.num_eval, config.train.num_steps) == (48, 16, 40)
    assert (all_clips.num_train, all_clips.num_eval, full.train.num_steps) == (160, 64, 250)
    assert config.train.seed == 3 and config.rollout == full.rollout and synth.kinds == ("grounding", "tracking")
    assert config.data.train == (f"{tmp_path}/data/train_grounding.jsonl", f"{tmp_path}/data/train_tracking.jsonl")
