"""A checkpoint named as the model of an evaluation, and what cannot be used as one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_policy import run_ranks
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, save_checkpoint
from vcr1_fast.run.checkpoint_model import with_model_of_checkpoint
from vcr1_fast.run.model_folder import model_digest, model_folder
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import config_to_yaml, load_config


def saved(run: Path, config: Config, base: str = "") -> tuple[Path, Learner]:
    """A checkpoint of a learner whose trained weights are all moved by a little."""
    learner = Learner(config, SINGLE_PROCESS, 1)
    with torch.no_grad():
        for weight in learner.policy.parameters():
            if weight.requires_grad:
                weight += 0.01
    state = RunState(3, 0, 0, 0, "pyav 1", config_to_yaml(config), base=base)
    parts = (learner.policy, learner.optimizer, learner.schedule)
    return save_checkpoint(run, *parts, state, SINGLE_PROCESS, keep=1), learner


def asked(checkpoint: Path, run: Path) -> Config:
    return load_config("tiny", [f"--model.path={checkpoint}", f"--train.output_dir={run}"])


def test_the_whole_model_comes_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint, learner = saved(tmp_path, load_config("tiny", ["--checkpoint.export_dtype=float32"]))
    config = with_model_of_checkpoint(asked(checkpoint, tmp_path), SINGLE_PROCESS)
    folder = Path(config.model.path)
    assert folder.parent == tmp_path / "eval" / "models" and folder.name.startswith("step_000003-")
    assert json.loads((folder / "vcr1_fast.json").read_text())["reader"] == "pyav 1"
    loaded = load_hugging_face(config.model.path, torch.float32, torch.device("cpu")).state_dict()
    wanted = learner.policy.get_submodule("hf").state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)

    other = tmp_path / "two_ranks"  # shards of one process, read by two
    run_ranks(Path(__file__).with_name("checkpoint_model_ranks.py"), str(checkpoint), str(other))
    [of_two] = (other / "eval" / "models").iterdir()
    assert (of_two / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    (folder / "model.safetensors").write_bytes(b"")  # what is there is not made again
    assert with_model_of_checkpoint(asked(checkpoint, tmp_path), SINGLE_PROCESS) == config
    assert (folder / "model.safetensors").stat().st_size == 0


def test_a_models_folder_is_left_as_it_is(tmp_path: Path) -> None:
    for path in ("tiny", str(tmp_path / "nowhere")):
        config = Config(model=replace(Config().model, path=path))
        assert with_model_of_checkpoint(config, SINGLE_PROCESS) is config


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("tiny"), base, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    frozen = load_config("tiny", [f"--model.path={base}", "--model.freeze_vision=true"])
    checkpoint, _ = saved(tmp_path, frozen, base=model_digest(base))
    config = asked(checkpoint, tmp_path)

    with (base / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="holds only what was trained, beside frozen weights of another model than"):
        with_model_of_checkpoint(config, SINGLE_PROCESS)
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"began with another model, which is needed, too: model.path is .*/base'"):
        with_model_of_checkpoint(config, SINGLE_PROCESS)
    shard = next(checkpoint.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged: shard-.* has CRC-32 .*: name another checkpoint"):
        with_model_of_checkpoint(config, SINGLE_PROCESS)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"no complete checkpoint: no file shard-"):
        with_model_of_checkpoint(config, SINGLE_PROCESS)
    assert not (tmp_path / "eval").exists()
