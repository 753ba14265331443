"""What runs keep of the video path: one decoder from checkpoint to results, and the list of files it refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.logged import logged
from vcr1_fast.evaluate import evaluate_command
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_settings
from vcr1_fast.train import train
from vcr1_fast.video.pyav_reader import PyavReader


def test_a_run_goes_on_with_its_decoder_and_its_list_of_bad_files(data_folder: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data_folder, data)
    video = data / "videos" / "train-grounding-00003.mp4"
    sound = video.read_bytes()
    video.write_bytes(b"")

    def settings(num_steps: int, *overrides: str) -> Config:
        sources = [f"--data.train=[{data}/train_grounding.jsonl]", f"--data.eval=[{data}/eval_grounding.jsonl]"]
        sizes = ["--train.prompts_per_step=8", "--rollout.group_size=2", "--rollout.max_new_tokens=4"]
        where = [f"--train.output_dir={run}", f"--train.num_steps={num_steps}"]
        rest = ["--video.num_workers=0", "--checkpoint.every=1", "--checkpoint.export=false", "--eval.max_examples=2"]
        return load_settings(Config, "tiny", [*sources, *where, *sizes, *rest, *overrides])

    def bad_files() -> list[str]:
        return [json.loads(line)["source"] for line in (run / "quarantine.jsonl").read_text().splitlines()]

    def metric(name: str, step: int) -> float:
        steps = logged(run)
        return next(line[name] for line in steps if line["step"] == step)

    train(settings(1))  # a step is the whole data set
    assert bad_files() == [str(video)] and metric("bad_samples", 1) == 1
    video.write_bytes(sound)
    train(settings(2))  # the list is believed, the file is not looked at
    assert bad_files() == [str(video)] and metric("bad_samples", 2) == 1
    train(settings(4, "--data.retry_quarantined=true", "--video.prefetch_steps=0"))
    assert bad_files() == [] and metric("bad_samples", 4) == 0
    # The second time through the data everything comes from the cache.
    assert metric("cache/misses", 3) == metric("cache/misses", 4) == 8 and metric("cache/hit_rate", 4) >= 0.5

    state = json.loads((run / "checkpoints" / "step_000004" / "state.json").read_text())
    assert state["reader"] == PyavReader.name
    with pytest.raises(ConfigError, match=rf"with the video reader '{PyavReader.name}.*, this run has 'decord 0\.6"):
        train(settings(5, "--video.reader=decord"))
    result = evaluate_command(settings(4, f"--eval.output_dir={tmp_path / 'eval'}"))
    assert result["reader"] == state["reader"]
    written = json.loads(next((tmp_path / "eval").rglob("scores.json")).read_text())
    assert written["reader"] == state["reader"]
