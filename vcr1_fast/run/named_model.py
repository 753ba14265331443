"""What a person calls a model: `tiny`, a Hugging Face folder, a run's folder, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.checkpoint_files import CHECKPOINTS_FOLDER, STATE_FILE, latest_checkpoint
from vcr1_fast.run.checkpoint_model import folder_of_model
from vcr1_fast.run.model_folder import CONFIG_FILE, TRAINED_WITH
from vcr1_fast.run.opened_checkpoint import open_checkpoint
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import ConfigError

RUN_SETTINGS = "config.yaml"  # in the folder of a run


@dataclass(frozen=True, slots=True)
class NamedModel:
    """What a name stands for."""

    path: str  # for model.path: a folder, or tiny
    settings: str | None  # for load_settings: of the run that made it, where that is known


def named_model(name: str) -> NamedModel:
    """The model of that name, and the settings that it was trained with (frame sizes, form of answers).

    Of a run its model/, else its newest checkpoint, which is written as a model to RUN/eval/models, once.
    Raises ConfigError when there is no such model, see also `open_checkpoint`.
    """
    if name == "tiny":
        return NamedModel("tiny", "tiny")
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return NamedModel(str(folder), _settings_in(folder.parent) if (folder / TRAINED_WITH).is_file() else None)
    if (folder / "model" / CONFIG_FILE).is_file():
        return NamedModel(str(folder / "model"), _settings_in(folder))
    checkpoint = checkpoint_of(name)
    run = checkpoint.absolute().parents[1]
    made = folder_of_model(checkpoint, run)
    if not (made / CONFIG_FILE).is_file():
        open_checkpoint(checkpoint, SINGLE_PROCESS).export(made, None, SINGLE_PROCESS)
        say(f"model of {checkpoint}: {made}")
    return NamedModel(str(made), _settings_in(run))


def checkpoint_of(name: str) -> Path:
    """A checkpoint by its path, or the newest intact one of a run. Raises ConfigError."""
    folder = Path(name).expanduser()
    if (folder / STATE_FILE).is_file():
        return folder
    newest = latest_checkpoint(folder) if (folder / CHECKPOINTS_FOLDER).is_dir() else None
    if newest is None:
        what = "holds no model and no checkpoint" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"{name} {what}: give the folder of a run, one of its checkpoints, a Hugging Face folder, or `tiny`"
        )
    return newest


def _settings_in(run: Path) -> str | None:
    return str(run / RUN_SETTINGS) if (run / RUN_SETTINGS).is_file() else None
