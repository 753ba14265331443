"""What runs keep of each other: the reader that a model was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from vcr1_fast.config import Config, ModelConfig
from vcr1_fast.learner.sharding import World
from vcr1_fast.run import TRAINED_WITH, Run, warn_of_other_reader


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
