"""Where the checkpoint of `model.path` lies. Imports neither torch nor transformers."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from vcr1_fast.config_error import ConfigError


def model_folder(path: str) -> Path:
    """The checkpoint folder that `model.path` names; `tiny` is the model inside the package.

    Raises ConfigError when there is no config.json in it.
    """
    if path == "tiny":
        with as_file(files("vcr1_fast.tiny")) as folder:
            return Path(folder)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path is {path!r}, but {folder / 'config.json'} does not exist: give the folder of a Hugging Face "
            "Qwen2.5-VL checkpoint, or `tiny`"
        )
    return folder
