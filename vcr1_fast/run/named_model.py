"""What a person calls a model: a packaged one, a Hugging Face folder or id, or a run's folder or checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vcr1_fast.run.checkpoint_files import CHECKPOINTS_FOLDER, STATE_FILE, latest_checkpoint
from vcr1_fast.run.hub_model import hub_model
from vcr1_fast.run.model_folder import CONFIG_FILE, PACKAGED, TRAINED_WITH
from vcr1_fast.settings.config import Config, ConfigError

RUN_SETTINGS = "config.yaml"  # in the folder of a run


@dataclass(frozen=True, slots=True)
class NamedModel:
    """What a name stands for."""

    path: (
        str  # for model.path: a packaged one, a folder, an id of the Hub, or of a run without a model yet a checkpoint
    )
    settings: str | None  # for load_settings: of the run that made it, where that is known
    run: Path | None = None  # of a checkpoint: where its model is written, see checkpoint_model.py

    def put_into(self, config: Config) -> Config:
        """The settings with this as `model.path`."""
        train = replace(config.train, output_dir=str(self.run)) if self.run else config.train
        return replace(config, model=replace(config.model, path=self.path), train=train)


def named_model(name: str) -> NamedModel:
    """The model of that name, and the settings that it was trained with (frame sizes, form of answers).

    Of a run its model/, else its newest checkpoint. Whether the Hub has a model of that id is asked later, and so is
    whether a checkpoint is whole. Raises ConfigError when there is no such model.
    """
    if name in PACKAGED:
        return NamedModel(name, name)
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return NamedModel(str(folder), _settings_in(folder.parent) if (folder / TRAINED_WITH).is_file() else None)
    if (folder / "model" / CONFIG_FILE).is_file():
        return NamedModel(str(folder / "model"), _settings_in(folder))
    if hub_model(name):
        return NamedModel(name, None)
    checkpoint = checkpoint_of(name)
    run = checkpoint.absolute().parents[1]
    return NamedModel(str(checkpoint), _settings_in(run), run)


def checkpoint_of(name: str) -> Path:
    """A checkpoint by its path, or the newest intact one of a run. Raises ConfigError."""
    folder = Path(name).expanduser()
    if (folder / STATE_FILE).is_file():
        return folder
    newest = latest_checkpoint(folder) if (folder / CHECKPOINTS_FOLDER).is_dir() else None
    if newest is None:
        what = "holds no model and no checkpoint" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"{name} {what}: give the folder of a run, one of its checkpoints, a Hugging Face folder or id, or "
            f"{' or '.join(PACKAGED)}"
        )
    return newest


def _settings_in(run: Path) -> str | None:
    return str(run / RUN_SETTINGS) if (run / RUN_SETTINGS).is_file() else None
