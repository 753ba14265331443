"""Where the checkpoint of `model.path` lies. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, sorted: those that its index names, else its one safetensors file.

    Others that lie there, such as shards of an earlier download, are not the checkpoint's. Raises ConfigError for a
    folder without safetensors, an index that names missing files, and several files without an index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} cannot be read ({type(error).__name__}: {error}): fetch it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{index} names {len(names)} files, but {', '.join(missing[:3])} of them "
                f"{'is' if len(missing) == 1 else 'are'} not there: fetch the checkpoint again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ConfigError(
            f"{folder} has {len(found)} safetensors files and no {index.name}, which says what belongs to the "
            "checkpoint: fetch it as well"
        )
    has_pickle = any(folder.glob("*.bin"))
    how = (
        "its .bin files are not read: convert them, AutoModelForImageTextToText.from_pretrained(...)"
        ".save_pretrained(..., safe_serialization=True)"
        if has_pickle
        else "fetch the weights"
    )
    raise ConfigError(f"{folder} has no safetensors file, wanted model.safetensors or its parts with an index; {how}")


def model_digest(folder: Path) -> str:
    """Tells one checkpoint from another: names, sizes and evenly spread samples of its weight files.

    Two fine-tunings of a model differ nearly everywhere, so 256 KiB of each file are enough, and 16 GB are not read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for index in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
