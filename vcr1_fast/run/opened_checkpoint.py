"""A checkpoint of a run, opened as a policy, and written as the Hugging Face folder or adapter that its run would
export. What was trained comes from the checkpoint, the rest from the model that the run began with."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vcr1_fast import __version__
from vcr1_fast.learner.kernel_choice import plain_choice
from vcr1_fast.learner.sharding import World
from vcr1_fast.learner.step import load_policy
from vcr1_fast.run.checkpoint import load_checkpoint
from vcr1_fast.run.checkpoint_files import DamagedError, find_damage, read_state
from vcr1_fast.run.export import export_hugging_face, plan_export
from vcr1_fast.run.hub import with_hub_model
from vcr1_fast.run.model_folder import TRAINED_WITH, model_digest, model_folder
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The policy as it was when the checkpoint was saved."""

    config: Config  # of the run
    policy: nn.Module
    source: Path  # the model that the run began with
    reader: str  # that its clips were read with

    def export(self, folder: Path, dtype: str | None, world: World) -> Path:
        """Write the model, adapters merged; dtype None: as checkpoint.export_dtype says. A collective.

        Raises OSError when it cannot be written.
        """
        wanted = dtype or self.config.checkpoint.export_dtype
        record = json.dumps({"vcr1_fast": __version__, "reader": self.reader}) + "\n"
        of_weights = None if wanted == "auto" else getattr(torch, wanted)
        plan = plan_export(self.source, folder, of_weights, {TRAINED_WITH: record.encode()})
        return export_hugging_face(self.policy, plan, world)


def open_checkpoint(checkpoint: Path, world: World) -> OpenedCheckpoint:
    """Load the weights. A collective; the number of ranks may be another one than at saving.

    Raises ConfigError when the checkpoint is damaged or the model that its run began with is not there or another one.
    """
    try:
        config = _settings(str(read_state(checkpoint)["config_yaml"]))
    except DamagedError as error:
        raise ConfigError(f"{checkpoint} is no complete checkpoint: {error}") from None
    damage = find_damage(checkpoint, world)
    if damage is not None:
        raise ConfigError(f"{checkpoint} is damaged: {damage}: name another checkpoint")
    try:
        config = with_hub_model(config, world)
        source = model_folder(config.model.path)
    except ConfigError as error:
        raise ConfigError(f"the run of {checkpoint} began with another model, which is needed, too: {error}") from None
    policy = load_policy(config, world, plain_choice())  # over these ranks in a row, however those of the run stood
    state = load_checkpoint(checkpoint, policy, None, None, world)
    has_frozen = not all(weight.requires_grad for weight in policy.parameters())
    if has_frozen and state.base not in ("", model_digest(source)):
        raise ConfigError(
            f"{checkpoint} holds only what was trained, beside frozen weights of another model than {source} is now: "
            "put the one back that its run began with"
        )
    return OpenedCheckpoint(config, policy, source, state.reader)


def _settings(config_yaml: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config_yaml, encoding="utf-8")
        return load_config(str(file), [])
