"""Where the checkpoint of `model.path` lies, and what its files hold. Imports neither torch nor transformers.

Two lists say which files a model consists of, whatever else lies in its folder: `weight_files` and `settings_files`.
What is loaded, hashed, exported or handed to another engine is what they name, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vcr1_fast.run.hub_model import cached_file, hub_model
from vcr1_fast.settings.error import ConfigError

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
CONFIG_FILE = "config.json"
TRAINED_WITH = "vcr1_fast.json"  # in the folder of an exported model: version and video reader of its training
STATE_FILE = "state.json"  # in a checkpoint of a run, see checkpoint_files.py
VIDEO_FILE = "vcr1_fast_video.json"  # settings of the section video that the model was taught with
SETTINGS_FILES = (  # beside the weights: what model, tokenizer, processor and generation are read from
    *(CONFIG_FILE, "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    VIDEO_FILE,
)
_TINY = Path(__file__).parents[1] / "tiny"
PACKAGED = {"tiny": _TINY, "tiny3": _TINY / "qwen3_vl"}  # models in the package, with their train.yaml and synth.yaml
_LFS_POINTER = b"version https://git-lfs"
_NUM_HASHED_AT_ONCE = 4  # files; each rank of a node reads the same ones


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a checkpoint, as the head of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in the words of safetensors, such as BF16


def model_folder(path: str) -> Path:
    """The checkpoint folder that `model.path` names; `tiny` and `tiny3` are models inside the package.

    `owner/name@<commit>` is the folder of that model in the Hub's cache, once `hub.with_hub_model` has put it there.
    Raises ConfigError when there is no config.json in it.
    """
    folder = named_folder(path)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"model.path is {path!r}, but {folder / CONFIG_FILE} does not exist: give the folder of a Hugging Face "
            "checkpoint, the id of one on the Hub such as Qwen/Qwen2.5-VL-7B-Instruct, or one of the package, "
            f"{' or '.join(PACKAGED)}"
        )
    return folder


def cached_config(path: str) -> Path | None:
    """config.json in the Hub's cache of a `model.path` that names a commit of the Hub."""
    model = hub_model(path)
    return cached_file(model, CONFIG_FILE) if model else None


def named_folder(path: str) -> Path:
    """`model_folder`, whether or not there is such a folder."""
    if path in PACKAGED:
        return PACKAGED[path]
    in_cache = cached_config(path)
    return in_cache.parent if in_cache else Path(path).expanduser()


def settings_files(folder: Path) -> list[Path]:
    """Those of `SETTINGS_FILES` that the folder has. Raises ConfigError for one that cannot be read or is damaged."""
    found = [folder / name for name in SETTINGS_FILES if (folder / name).exists()]
    for path in found:
        if path.suffix == ".json":
            read_json(path)
        else:
            _require_content(path)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint that holds a JSON object. Raises ConfigError."""
    try:
        _require_content(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"a JSON {type(content).__name__}, wanted an object"
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        problem = str(error)
    raise ConfigError(f"{path} is damaged ({problem}): download it again")


def require_tokenizer(folder: Path) -> None:
    """Raises ConfigError when the folder has no tokenizer, or one without its settings: transformers would take others,
    such as no token that ends an answer, and train on that."""
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
    has = {name: (folder / name).is_file() for name in names}
    if not (has["tokenizer_config.json"] and (has["tokenizer.json"] or (has["vocab.json"] and has["merges.txt"]))):
        raise ConfigError(
            f"{folder} has no whole tokenizer, wanted tokenizer_config.json, and tokenizer.json or vocab.json and "
            "merges.txt: copy the files of the tokenizer there from the checkpoint that the model was made of"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, sorted: those that the index names, else the one file of a small model.

    Whatever else lies in the folder is not of the model. Raises ConfigError when a file is missing or there is none.
    """
    if (folder / INDEX_FILE).is_file():
        named = set(_index(folder).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            hint = f", or delete the index if {SINGLE_FILE} is the model" if (folder / SINGLE_FILE).is_file() else ""
            raise ConfigError(
                f"{folder / INDEX_FILE} names {_some(sorted(named))}, but {_some(missing)} is not there: download the "
                f"missing files{hint}"
            )
        return sorted(folder / name for name in named)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth", ".pt", ".safetensors"))
    raise ConfigError(
        f"{folder} has {_some(others) if others else 'no weights'}, wanted {SINGLE_FILE}, or {INDEX_FILE} and the "
        "files it names: download the checkpoint again, or load it with transformers and save_pretrained it to a new "
        "folder"
    )


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """Every weight of the checkpoint under the name it has there, read from the heads of `weight_files`.

    Raises ConfigError as they do, and when a file is damaged, a weight is in two files, or the index says otherwise.
    """
    found: dict[str, StoredWeight] = {}
    for path in weight_files(folder):
        try:
            _require_content(path)
            with safe_open(path, "np") as file:  # pyright: ignore[reportPrivateImportUsage]
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in found:
                        raise ConfigError(
                            f"{name} is in {found[name].file.name} and in {path.name} of {folder}, wanted each weight "
                            "once: download the checkpoint again into an empty folder"
                        )
                    head = file.get_slice(name)
                    found[name] = StoredWeight(path, tuple(head.get_shape()), str(head.get_dtype()))
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}): download it again") from None
    if (folder / INDEX_FILE).is_file():
        index = _index(folder)
        other = [name for name in {**index, **found} if name not in found or index.get(name) != found[name].file.name]
        if other:
            raise ConfigError(
                f"{folder / INDEX_FILE} does not say where {_some(sorted(other))} is, or says it wrongly: download the "
                "checkpoint again into an empty folder"
            )
    return found


def model_digest(folder: Path) -> str:
    """Tells one checkpoint from another: SHA-256 of the contents of all that is read of it, weights and settings, hex.

    Whole contents, because an edited embedding or a merged layer changes a small part of a large file, and not sizes
    and times, which a copy keeps or changes as it likes. Some files at once: a core takes 1 to 1.6 s for a GB.
    Raises ConfigError as `weight_files` and `settings_files` do.
    """
    files = sorted([*weight_files(folder), *settings_files(folder)])
    with ThreadPoolExecutor(_NUM_HASHED_AT_ONCE) as threads:
        digests = threads.map(_file_digest, files)
        lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index(folder: Path) -> dict[str, str]:
    """Weight -> name of its file."""
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(f"{path} is damaged (its weight_map is {weight_map!r}): download it again")
    index = {str(weight): str(name) for weight, name in weight_map.items()}
    outside = [name for name in index.values() if Path(name).name != name or not name.endswith(".safetensors")]
    if outside or not index:
        raise ConfigError(
            f"{path} names {outside[0] if outside else 'no file'!r}, wanted safetensors files beside it: download it "
            "again"
        )
    return index


def _require_content(path: Path) -> None:
    """Raises ConfigError for a file that is not there, cannot be read, or is Git LFS's note of where its content is."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): download it, or allow it to be read") from None
    if start == _LFS_POINTER:
        raise ConfigError(
            f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in {path.parent}, or download it"
        )


def _some(names: list[str]) -> str:
    """The first names of a list, and how many there are beyond them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
