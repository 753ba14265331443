"""The checkpoints of a run on disk: which there are, whether each byte is as it was written, which one to go on from.

state.json names every file with its size and CRC-32, and holds a CRC-32 of itself. What does not fit is damage: such a
checkpoint is named and passed over. The CRC is of zlib: 1.7 GB/s on one core, and each rank reads its own files, so
100 GB cost 60 s on one rank and 8 s on eight (once in a save, from memory, and once on a resume). It sees every
single flipped bit, and a torn or exchanged file but for one chance in 4 billion.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, gather_all, on_main_rank
from vcr1_fast.run.checkpoint_writer import FORMAT, crc32_of_document
from vcr1_fast.run.model_folder import STATE_FILE as STATE_FILE
from vcr1_fast.settings.config import Config, ConfigError

CHECKPOINTS_FOLDER = "checkpoints"  # below train.output_dir

_LOG = logging.getLogger(__name__)
_WITHOUT_DIGESTS = 1  # the format before this one: sizes alone
_STEP_NAME = re.compile(r"step_\d{6,}")
_READ_BYTES = 4 << 20
_NUM_READERS = 4  # files read at once by one rank: a CRC holds one core, a network disk is slower than that


class DamagedError(ConfigError):
    """A folder is not a complete checkpoint. The message is the reason alone."""


# ---- one checkpoint ------------------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says, once it is whole and every file is there in its size; contents: see `find_damage`.

    Raises DamagedError, and ConfigError for one that a newer version of this program made.
    """
    try:
        document = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if document["format"] != _WITHOUT_DIGESTS and document.pop("crc32") != crc32_of_document(document):
            raise DamagedError(f"{STATE_FILE} is damaged: it does not fit its CRC-32")
        if document["format"] > FORMAT:
            raise ConfigError(
                f"{checkpoint} has format {document['format']}, this version of vcr1-fast reads up to {FORMAT}: "
                f"install {document['versions']['vcr1-fast']} or newer, or choose another train.output_dir"
            )
        for name, (num_bytes, _) in _files(document).items():
            got_bytes = (checkpoint / name).stat().st_size
            if got_bytes != num_bytes:
                raise DamagedError(f"{name} has {got_bytes} bytes, wanted {num_bytes}")
    except FileNotFoundError as error:
        raise DamagedError(f"no file {Path(error.filename).name}") from None
    except OSError as error:
        raise DamagedError(f"{error.strerror}: {error.filename}") from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{STATE_FILE} is damaged: {type(error).__name__} {error}") from None
    return document


def find_damage(checkpoint: Path, world: World = SINGLE_PROCESS) -> str | None:
    """Why the contents are not those that were written, or None. A collective: each rank reads its share of the files.

    `read_state` must have taken the folder. Files of the format without digests are not read.
    """
    mine: list[str] = []
    try:
        wanted = {name: crc32 for name, (_, crc32) in _files(read_state(checkpoint)).items() if crc32 is not None}
        got = crc32_of_files(checkpoint, list(wanted)[world.rank :: world.world_size])
        mine = [
            f"{name} has CRC-32 {crc32}, wanted {wanted[name]}" for name, crc32 in got.items() if crc32 != wanted[name]
        ]
    except (DamagedError, OSError) as error:
        mine = [str(error)]
    return next((reason for reasons in gather_all(mine, world) for reason in reasons), None)


def is_intact(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint, every byte of it, whatever its name. Reads all of it, on this rank."""
    try:
        read_state(folder)
    except ConfigError:
        return False
    return find_damage(folder) is None


def crc32_of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> CRC-32 in hex. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(_NUM_READERS, "crc32") as pool:
        return dict(zip(names, pool.map(lambda name: _crc32_of_file(folder / name), names), strict=True))


def _crc32_of_file(path: Path) -> str:
    crc, buffer = 0, memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            crc = zlib.crc32(buffer[:num_bytes], crc)
    return f"{crc:08x}"


def _files(document: dict[str, Any]) -> dict[str, tuple[int, str | None]]:
    """Name -> size and CRC-32."""
    if document["format"] == _WITHOUT_DIGESTS:
        return {name: (num_bytes, None) for name, num_bytes in document["files"].items()}
    return {name: (entry["bytes"], entry["crc32"]) for name, entry in document["files"].items()}


# ---- those of a run ------------------------------------------------------------------------------------------------


def scan(output_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """The complete checkpoints in the order in which they were saved, and the other step folders with their reason.

    Contents are not read, see `find_damage`. Raises ConfigError where one is of a newer version of this program.
    """
    found: list[tuple[int, Path]] = []
    damaged: dict[Path, str] = {}
    for path in sorted((output_dir / CHECKPOINTS_FOLDER).glob("step_*")):
        if not _STEP_NAME.fullmatch(path.name):
            continue
        try:
            found.append((read_state(path)["save_index"], path))
        except DamagedError as error:
            damaged[path] = str(error)
    return [path for _, path in sorted(found)], damaged


def latest_checkpoint(output_dir: str | Path, world: World = SINGLE_PROCESS) -> Path | None:
    """The intact checkpoint that was saved last, or None where there is no step folder. A collective.

    Last saved, not highest step: after a resume from an older step, the new branch counts. Damaged ones are named and
    passed over. Raises ConfigError, on every rank, where all are: what to do then is for a person to say.
    """
    complete, damaged = _scan_on_main(Path(output_dir), world)
    for path in reversed(complete):
        reason = find_damage(path, world)
        if reason is None:
            _warn_of(damaged, world)
            return path
        damaged[path] = reason
    if damaged:
        folder = Path(output_dir) / CHECKPOINTS_FOLDER
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ConfigError(
            f"{folder} has no checkpoint that can be read ({reasons}): restore one from a copy, or to start anew "
            "choose another train.output_dir or move that folder away; nothing was changed"
        )
    return None


def resolve_resume(resume: str, output_dir: str | Path, world: World = SINGLE_PROCESS) -> Path | None:
    """What `train.resume` means: the checkpoint to load, or None to start anew. A collective.

    auto: the latest in output_dir, if any. never: None. Else the path of one checkpoint.
    Raises ConfigError, on every rank, for `never` with step folders present, for a path that is not an intact
    checkpoint, and as `latest_checkpoint` does.
    """
    if resume == "auto":
        return latest_checkpoint(output_dir, world)
    if resume == "never":
        complete, damaged = _scan_on_main(Path(output_dir), world)
        if complete or damaged:
            latest = complete[-1] if complete else list(damaged)[-1]
            raise ConfigError(
                f"train.resume is never, but {latest.parent} holds checkpoints (latest: {latest.name}): "
                "choose another train.output_dir, delete that folder, or set train.resume=auto"
            )
        return None
    path = Path(resume)
    try:
        read_state(path)
        problem = None
    except DamagedError as error:
        problem = str(error)
    problem = next((reason for reason in gather_all(problem, world) if reason), None) or find_damage(path, world)
    if problem is not None:
        raise ConfigError(
            f"train.resume is {resume}, which is not a complete checkpoint ({problem}): "
            f"wanted a folder such as {Path(output_dir) / CHECKPOINTS_FOLDER / 'step_000010'}, auto, or never"
        )
    return path


def recorded_state(config: Config) -> dict[str, Any]:
    """state.json of the run that goes on, by its newest checkpoint; {} of a new run. On one rank."""
    resume = config.train.resume
    with contextlib.suppress(ConfigError):  # what is wrong with a checkpoint, loading it says
        found = [Path(resume)] if resume not in ("auto", "never") else scan(Path(config.train.output_dir))[0]
        return read_state(found[-1]) if found and resume != "never" else {}
    return {}


def recorded_model(config: Config, state: Mapping[str, Any]) -> str | None:
    """The `model.path` of the run that goes on, a commit of the Hub perhaps, if it was asked for in the same words."""
    if state.get("asked_model") != config.model.path:
        return None
    return str(yaml.safe_load(state["config_yaml"])["model"]["path"])


def _scan_on_main(output_dir: Path, world: World) -> tuple[list[Path], dict[Path, str]]:
    """`scan` of rank 0 on every rank: on a network disk others may not see yet what it sees."""
    found: list[tuple[list[Path], dict[Path, str]]] = [([], {})]

    def action() -> None:
        found[0] = scan(output_dir)

    on_main_rank("looking for checkpoints", action, world)
    return gather_all(found[0], world)[0]


def _warn_of(damaged: dict[Path, str], world: World) -> None:
    if world.is_main:
        for path, reason in damaged.items():
            _LOG.warning("passing over checkpoint %s: %s", path, reason)
