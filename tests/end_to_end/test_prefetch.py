"""A run whose clips are slow to read: the trainer does not wait for them, because they are read ahead."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import vcr1_fast.run.sources
from tests.logged import logged
from tests.video.slow_reader import CLIP_S, open_slow_reader
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings
from vcr1_fast.train import train
from vcr1_fast.video.loader import FrameLoader

NUM_STEPS, PROMPTS_PER_STEP, NUM_WORKERS = 7, 4, 4
WARM_UP = 3  # steps: the first wait for the workers to start, those after it for what could not be read ahead yet


def _run(data_folder: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    settings = [
        f"--data.train=[{data_folder}/train_grounding.jsonl,{data_folder}/train_tracking.jsonl]",
        "--data.eval=[]",
        f"--train.output_dir={folder}",
        f"--train.num_steps={NUM_STEPS}",
        f"--train.prompts_per_step={PROMPTS_PER_STEP}",
        "--checkpoint.export=false",
        "--checkpoint.every=0",
        "--video.cache_ram_gib=0",  # else the second epoch would be read from memory
        *overrides,
    ]
    train(load_settings(Config, "tiny", settings))
    return logged(folder)


@pytest.mark.slow
def test_slow_clips_are_read_while_the_trainer_works(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = functools.partial(FrameLoader, open_reader=open_slow_reader)
    monkeypatch.setattr(vcr1_fast.run.sources, "FrameLoader", loader)
    ahead = _run(data_folder, tmp_path / "ahead", f"--video.num_workers={NUM_WORKERS}")
    at_need = _run(data_folder, tmp_path / "at_need", f"--video.num_workers={NUM_WORKERS}", "--video.prefetch_steps=0")
    assert all(line["video/clips_read"] >= line["step"] * PROMPTS_PER_STEP for line in ahead)

    def waiting_frac(steps: list[dict[str, float]]) -> float:
        return sum(s["time/video_wait_s"] for s in steps) / sum(s["step_time"] for s in steps)

    assert waiting_frac(ahead[WARM_UP:]) < 0.01
    # without reading ahead each step waits for its clips, all of them read at once: every thread CLIP_S
    assert all(step["time/video_wait_s"] > 0.9 * PROMPTS_PER_STEP * CLIP_S for step in at_need[WARM_UP:])
    rewards = [[step["reward"] for step in steps] for steps in (ahead, at_need)]
    assert rewards[0] == rewards[1]  # when a clip was read changes nothing
