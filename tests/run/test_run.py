"""What runs keep of each other: the reader that a model was trained with, the model that frozen weights are of, the
dtype of weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from tests.learner.conftest import random_model
from tests.recording_engine import RecordingEngine
from tests.tiny_policy import tiny_tokenizer
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.run import (
    TRAINED_WITH,
    Run,
    export_model,
    open_weight_sync,
    planned_export,
    warn_of_other_reader,
)
from vcr1_fast.settings.config import CheckpointConfig, Config, LoRAConfig, ModelConfig


@pytest.mark.parametrize(
    ("rank", "trained_with", "is_told"),
    [(0, "pyav 18.1", False), (0, "decord 0.6.0", True), (1, "decord 0.6.0", False), (0, None, False)],
)
def test_a_model_trained_with_another_reader_is_told_once(tmp_path: Path, capsys, rank, trained_with, is_told):
    (tmp_path / "config.json").write_text("{}")
    if trained_with:
        (tmp_path / TRAINED_WITH).write_text(json.dumps({"vcr1_fast": "0.1", "reader": trained_with}))
    config = Config(model=ModelConfig(path=str(tmp_path)))
    world = World(rank, 2, rank, torch.device("cpu"))
    warn_of_other_reader(
        cast(Run, SimpleNamespace(config=config, world=world, source=SimpleNamespace(name="pyav 18.1")))
    )
    told = capsys.readouterr().err
    assert ("trained with the video reader 'decord 0.6.0', this run reads with 'pyav 18.1'" in told) == is_told
    assert is_told or not told


@pytest.mark.parametrize(
    ("stored", "wanted", "got"),
    [("bfloat16", "auto", "bfloat16"), ("float32", "auto", "float32"), ("bfloat16", "float32", "float32")],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_is_exported_in_the_dtype_it_came_in(tmp_path: Path, stored: str, wanted: str, got: str, rank: int):
    random_model(seed=1).to(getattr(torch, stored)).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    model = ModelConfig(path=str(tmp_path / "start"), device="cpu", lora=LoRAConfig(rank=rank))
    config = Config(model=model, checkpoint=CheckpointConfig(export_dtype=wanted))  # type: ignore[arg-type]
    plan = planned_export(config, tmp_path / "run", "pyav 18", SINGLE_PROCESS)
    run = cast(Run, SimpleNamespace(config=config, folder=tmp_path / "run", world=SINGLE_PROCESS, export=plan))
    folder = export_model(run, Learner(config, SINGLE_PROCESS, 10))
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, got)}
    start = load_file(tmp_path / "start" / "model.safetensors")  # nothing was trained, so every weight comes back
    assert start.keys() == weights.keys()
    assert all(torch.equal(weights[name], weight.to(weights[name].dtype)) for name, weight in start.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == got


def test_weights_are_pushed_in_the_dtype_that_the_engine_has(tmp_path: Path):
    random_model(seed=1).save_pretrained(tmp_path / "start")
    model = ModelConfig(path=str(tmp_path / "start"), compute_dtype="bfloat16", device="cpu")
    config, engine = Config(model=model), RecordingEngine()
    learner = Learner(config, SINGLE_PROCESS, 10)
    sync = open_weight_sync(cast(Run, SimpleNamespace(config=config)), learner, engine, policy_version=5)
    report = sync.push()
    assert {weight.dtype for weight in engine.loaded.values()} == {torch.bfloat16}
    assert report.num_bytes == 2 * sum(weight.numel() for weight in learner.policy.parameters())
    assert report.policy_version == 5
