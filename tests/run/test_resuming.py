"""What a resumed run says and refuses when it is not the one that made the checkpoint."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.learner.conftest import random_model
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.run.checkpoint import RunState
from vcr1_fast.run.model_folder import model_digest
from vcr1_fast.run.resuming import differing_settings, load_state
from vcr1_fast.run.run import Run, make_saver
from vcr1_fast.settings.config import Config, ConfigError, LoRAConfig, ModelConfig, TaskConfig, TrainConfig
from vcr1_fast.settings.io import config_to_yaml
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.prompt_file import prompt_digests

PROMPTS = cast(PromptStream, SimpleNamespace(position=0, digest="d"))


def make_run(tmp_path: Path, model_seed: int = 1, rank: int = 0, **train: Any) -> Run:
    folder = tmp_path / f"model-{model_seed}"
    if not folder.exists():
        random_model(model_seed).save_pretrained(folder)
    model = ModelConfig(path=str(folder), compute_dtype="float32", device="cpu", lora=LoRAConfig(rank=rank))
    config = Config(model=model, train=TrainConfig(output_dir=str(tmp_path / "run"), **train))
    parts = {"folder": tmp_path / "run", "source": SimpleNamespace(name="pyav 18"), "world": SINGLE_PROCESS}
    return cast(Run, SimpleNamespace(config=config, tasks={}, base_digest=model_digest(folder), **parts))


def save(run: Run, data: str = "d") -> None:
    learner = Learner(run.config, SINGLE_PROCESS, 10)
    prompts = prompt_digests(run.tasks)
    state = RunState(3, 0, 0, 0, "pyav 18", config_to_yaml(run.config), run.base_digest, data=data, prompts=prompts)
    with make_saver(run, learner) as saver:
        saver.save(state)


def load(run: Run) -> RunState:
    return load_state(run, Learner(run.config, SINGLE_PROCESS, 10), PROMPTS, "train")


def test_frozen_weights_of_another_model_are_refused(tmp_path: Path):
    """Adapters alone fit any model of that size, so no setting allows it."""
    save(make_run(tmp_path, 1, rank=2))
    assert load(make_run(tmp_path, 1, rank=2)).step == 3
    with pytest.raises(ConfigError, match=r"beside frozen weights of another model than .*model-2: set model\.path"):
        load(make_run(tmp_path, 2, rank=2, resume_changed=True))


@pytest.mark.parametrize(
    ("saved_data", "model", "seed", "what"),
    [
        ("d", 1, 7, r"train\.seed \(was 0, is 7\)"),
        ("other", 1, 0, r"the examples of data\.train"),
        ("d", 2, 0, r"the weights or settings in model\.path"),
        ("other", 2, 7, r"train\.seed .*, the examples of data\.train, the weights"),
    ],
)
def test_other_data_seed_or_model_is_refused_unless_it_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved_data: str, model: int, seed: int, what: str
):
    save(make_run(tmp_path), saved_data)
    with pytest.raises(ConfigError, match=rf"step 3 of another one, which differs in {what}.*resume_changed=true"):
        load(make_run(tmp_path, model, seed=seed))
    assert load(make_run(tmp_path, model, seed=seed, resume_changed=True)).step == 3
    assert "other than before, as train.resume_changed allows" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_its_data_goes_on(tmp_path: Path):
    save(make_run(tmp_path), data="")
    assert load(make_run(tmp_path)).step == 3


def test_another_prompt_file_is_refused_unless_it_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By what is in the file, not by its name; a task without a file has none to differ in."""

    def asking(text: str, name: str = "a.txt", **train: Any) -> Run:
        (tmp_path / name).write_text(text)
        run = make_run(tmp_path, **train)
        prompts = {"temporal_grounding": str(tmp_path / name)} if text else {}
        return cast(Run, SimpleNamespace(**{**vars(run), "tasks": make_tasks(TaskConfig(prompts=prompts))}))

    differs = r"step 3 of another one, which differs in the question of temporal_grounding \(task.prompts\): set"
    save(asking("When: {event}?"))
    assert load(asking("When: {event}?", "b.txt")).prompts.keys() == {"temporal_grounding"}
    for text in ("At which second: {event}?", ""):
        with pytest.raises(ConfigError, match=differs):
            load(asking(text))
    assert load(asking("At which second: {event}?", resume_changed=True)).step == 3
    assert "as train.resume_changed allows: the question of temporal_grounding" in capsys.readouterr().out
    save(asking(""))
    with pytest.raises(ConfigError, match=differs):
        load(asking("When: {event}?"))


def test_other_settings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path)
    save(run)
    rollout = replace(run.config.rollout, group_size=4)
    optimizer = replace(run.config.optimizer, learning_rate=2e-6)
    free = replace(run.config.train, num_steps=500)
    config = replace(run.config, rollout=rollout, optimizer=optimizer, train=free)
    load(cast(Run, SimpleNamespace(**{**vars(run), "config": config})))
    out = capsys.readouterr().out
    assert "other than before: optimizer.learning_rate: 1e-06 -> 2e-06" in out
    assert "other than before: rollout.group_size: 8 -> 4" in out and "num_steps" not in out


def test_differences_by_hand():
    """One of each kind: another value, one that is new, one that is gone, and two that do not count."""
    before = "a: {b: 1, c: [1, 2], d: x}\ntrain: {num_steps: 3}\ncheckpoint: {every: 1}"
    now = "a: {b: 1, c: [1, 3], e: y}\ntrain: {num_steps: 4}\ncheckpoint: {every: 2}"
    assert differing_settings(before, now) == ["a.c: [1, 2] -> [1, 3]", "a.d: x -> None", "a.e: None -> y"]
    long = differing_settings("a: " + 100 * "x", "a: y")
    assert long == ["a: " + 60 * "x" + "... -> y"]
