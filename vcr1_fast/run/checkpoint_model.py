"""A checkpoint of a run, in the middle of it or at its end -> the Hugging Face folder that an export would have made.

So that `vcr1-fast eval --model.path=RUN/checkpoints/step_000100` reads it like any other model, in every engine. What
was trained comes from the checkpoint, and so do its settings; the rest is of the model that the run began with.
"""

from __future__ import annotations

import gc
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vcr1_fast import __version__
from vcr1_fast.learner.kernel_choice import plain_choice
from vcr1_fast.learner.sharding import World, gather_all
from vcr1_fast.learner.step import load_policy
from vcr1_fast.run.checkpoint import RunState, load_checkpoint
from vcr1_fast.run.checkpoint_files import STATE_FILE, DamagedError, find_damage, read_state
from vcr1_fast.run.export import export_hugging_face, plan_export
from vcr1_fast.run.model_folder import CONFIG_FILE, TRAINED_WITH, model_digest, model_folder
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config


def with_model_of_checkpoint(config: Config, world: World) -> Config:
    """The settings with `model.path` at a model's folder, where it named a checkpoint of a run. A collective.

    The folder is made once, in eval/models below train.output_dir, named after step and contents. The number of ranks
    may be another one than at saving.
    Raises ConfigError when the checkpoint is damaged or the model that its run began with is not there or another one,
    OSError when the folder cannot be written.
    """
    checkpoint = Path(config.model.path).expanduser()
    if (checkpoint / CONFIG_FILE).is_file() or not (checkpoint / STATE_FILE).is_file():
        return config
    name = f"{checkpoint.name}-{zlib.crc32((checkpoint / STATE_FILE).read_bytes()):08x}"
    folder = (Path(config.train.output_dir) / "eval" / "models" / name).absolute()
    if not gather_all((folder / CONFIG_FILE).is_file(), world)[0]:
        _export(checkpoint, folder, world)
        gc.collect()
        torch.cuda.empty_cache()  # a colocated engine sizes itself by what is free, and cached memory is not
    return replace(config, model=replace(config.model, path=str(folder)))


def _export(checkpoint: Path, folder: Path, world: World) -> None:
    try:
        made_with = _settings(str(read_state(checkpoint)["config_yaml"]))
    except DamagedError as error:
        raise ConfigError(f"model.path is {checkpoint}, which is no complete checkpoint: {error}") from None
    damage = find_damage(checkpoint, world)
    if damage is not None:
        raise ConfigError(f"model.path is {checkpoint}, which is damaged: {damage}: name another checkpoint")
    try:
        source = model_folder(made_with.model.path)
    except ConfigError as error:
        raise ConfigError(f"the run of {checkpoint} began with another model, which is needed, too: {error}") from None
    policy = load_policy(made_with, world, plain_choice())
    state = load_checkpoint(checkpoint, policy, None, None, world)
    _require_same_base(policy, state, source, checkpoint)
    wanted = made_with.checkpoint.export_dtype
    record = json.dumps({"vcr1_fast": __version__, "reader": state.reader}) + "\n"
    dtype = None if wanted == "auto" else getattr(torch, wanted)
    export_hugging_face(policy, plan_export(source, folder, dtype, {TRAINED_WITH: record.encode()}), world)
    say(f"model of {checkpoint}: {folder}")


def _settings(config_yaml: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config_yaml, encoding="utf-8")
        return load_config(str(file), [])


def _require_same_base(policy: nn.Module, state: RunState, source: Path, checkpoint: Path) -> None:
    has_frozen = not all(weight.requires_grad for weight in policy.parameters())
    if has_frozen and state.base not in ("", model_digest(source)):
        raise ConfigError(
            f"{checkpoint} holds only what was trained, beside frozen weights of another model than {source} is now: "
            "put the one back that its run began with"
        )
