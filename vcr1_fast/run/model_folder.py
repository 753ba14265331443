"""Where the checkpoint of `model.path` lies. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
from importlib.resources import as_file, files
from pathlib import Path

from vcr1_fast.settings.error import ConfigError

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file


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


def model_digest(folder: Path) -> str:
    """Tells one checkpoint from another: names, sizes and evenly spread samples of its safetensors files.

    Two fine-tunings of a model differ nearly everywhere, so 256 KiB of each file are enough, and 16 GB are not read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for index in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
