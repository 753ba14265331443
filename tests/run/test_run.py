"""What runs keep of each other: the reader that a model was trained with, the model that frozen weights are of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from tests.learner.conftest import random_model
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState
from vcr1_fast.run.model_folder import model_digest
from vcr1_fast.run.run import TRAINED_WITH, Run, load_state, save_state, warn_of_other_reader
from vcr1_fast.settings.config import Config, ConfigError, LoRAConfig, ModelConfig, TrainConfig


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


def test_a_models_digest_is_of_its_weights_alone(tmp_path: Path):
    random_model(seed=1).save_pretrained(tmp_path / "a")
    random_model(seed=1).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("the same weights")
    first = model_digest(tmp_path / "a")
    assert model_digest(tmp_path / "b") == first
    weights = tmp_path / "b" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_digest(tmp_path / "b") != first


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_weights_of_another_model_are_refused(tmp_path: Path, rank: int):
    """A checkpoint with adapters alone fits any model of that size; one with every weight does not need the model."""
    runs = []
    for seed in (1, 2):
        folder = tmp_path / f"model-{seed}"
        random_model(seed).save_pretrained(folder)
        model = ModelConfig(path=str(folder), compute_dtype="float32", device="cpu", lora=LoRAConfig(rank=rank))
        config = Config(model=model, train=TrainConfig(output_dir=str(tmp_path / "run")))
        where = {"folder": tmp_path / "run", "source": SimpleNamespace(name="pyav 18"), "world": SINGLE_PROCESS}
        runs.append(cast(Run, SimpleNamespace(config=config, base_digest=model_digest(folder), **where)))
    first, second = (Learner(run.config, SINGLE_PROCESS, 10) for run in runs)
    save_state(runs[0], first, RunState(3, 0, 0, 0, "pyav 18", "", runs[0].base_digest))
    assert load_state(runs[0], first, "train").step == 3
    if rank:
        with pytest.raises(
            ConfigError, match=r"beside frozen weights of another model than .*model-2: set model\.path"
        ):
            load_state(runs[1], second, "train")
    else:
        assert load_state(runs[1], second, "train").step == 3
