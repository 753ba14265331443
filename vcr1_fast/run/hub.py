"""A model of the Hugging Face Hub -> the files of it that are read, in the Hub's cache, by huggingface_hub.

`with_hub_model` runs once when a run starts, and puts the commit into `model.path`: `owner/name@<commit>` stands in the
run's config.yaml and in its checkpoints, and `model_folder` finds that in the cache from then on without a network.
Where the files are on another machine, the same path fetches the same ones again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.sharding import World, gather_all, on_all_ranks, on_main_rank
from vcr1_fast.run.hub_model import HubModel, cached_file, hub_model
from vcr1_fast.run.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SETTINGS_FILES,
    SINGLE_FILE,
    TRAINED_WITH,
    read_json,
    require_tokenizer,
    weight_files,
)
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config, ConfigError

ANSWER_LIMIT_S = 10.0  # for the first question; what the client does after that has limits of its own
_SMALL_FILES = (*SETTINGS_FILES, INDEX_FILE, TRAINED_WITH)


def with_hub_model(config: Config, world: World, recorded: str | None = None) -> Config:
    """The settings with `model.path` at a commit, where it names a model of the Hub. A collective.

    Rank 0 resolves it and downloads what the cache lacks; then the first rank of each other machine, whose cache may be
    another one, while the rest wait. recorded: the path that an earlier part of this run had for the same words.
    Raises ConfigError, on every rank, where that cannot be done.
    """
    found: list[HubModel | None] = [None]

    def download_here() -> None:
        model = hub_model(config.model.path)
        found[0] = download(hub_model(recorded or "") or model) if model else None

    on_main_rank("getting model.path from the Hugging Face Hub", download_here, world)
    model = gather_all(found[0], world)[0]
    if model is None:
        return config
    is_first_elsewhere = world.local_rank == 0 and not world.is_main
    on_all_ranks("getting model.path from the Hub", lambda: download(model) if is_first_elsewhere else None, world)
    return replace(config, model=replace(config.model, path=str(model)))


def with_hub_config(config: Config) -> Config:
    """The settings with `model.path` at a commit whose config.json is in the cache, and perhaps nothing else.

    For sums over its sizes. Raises ConfigError as `with_hub_model` does.
    """
    model = hub_model(config.model.path)
    if model is None:
        return config
    pinned, _ = _fetch(model, [CONFIG_FILE], is_online=_answers(model))
    return replace(config, model=replace(config.model, path=str(pinned)))


def download(model: HubModel) -> HubModel:
    """Bring all that is read of a model into the cache, and nothing else; gives it with its commit. On one process.

    Files that are there whole are not asked for again, and a connection that breaks is taken up again where it did.
    Raises ConfigError.
    """
    is_online = _answers(model)
    pinned, folder = _fetch(model, _SMALL_FILES, is_online)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{model} on the Hugging Face Hub has no {CONFIG_FILE}, wanted a checkpoint that transformers reads: set "
            "model.path to another"
        )
    read_config(folder)  # raises for an architecture that is not known here, before its weights are loaded
    require_tokenizer(folder)
    has_index = (folder / INDEX_FILE).is_file()
    names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values())) if has_index else [SINGLE_FILE]
    missing = [name for name in names if cached_file(pinned, name) is None]
    if missing:
        total_bytes = read_json(folder / INDEX_FILE).get("metadata", {}).get("total_size") if has_index else None
        size = f" of {total_bytes / 1e9:.1f} GB together" if isinstance(total_bytes, int | float) else ""
        say(f"model {pinned}: downloading {len(missing)} of {len(names)} files of weights{size} to {folder}")
        began = time.monotonic()
        _fetch(pinned, names, is_online)
        say(f"model {pinned}: downloaded in {time.monotonic() - began:.0f} s")
    weight_files(folder)
    return pinned


def _answers(model: HubModel) -> bool:
    """Whether the Hub is there and knows the model; of a pinned one, whether it may be asked. False, with a line, where
    the cache has to do. Raises ConfigError when the Hub is there and says no."""
    from huggingface_hub import HfApi, constants, errors, is_offline_mode

    if is_offline_mode():
        return False
    if model.is_pinned:
        return True
    try:
        HfApi().model_info(model.repo, revision=model.revision, timeout=ANSWER_LIMIT_S)
    except Exception as error:  # no network, no such host, no answer: the HTTP client has a class for each
        says_no = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in range(400, 429)
        if says_no or isinstance(error, errors.HFValidationError):
            raise _explained(error, model, is_online=True) from error
        say(f"{constants.ENDPOINT} cannot be asked for {model} ({_short(error)}): looking for what the cache has of it")
        return False
    return True


def _fetch(model: HubModel, names: Sequence[str], is_online: bool) -> tuple[HubModel, Path]:
    """Those of the files that the repository has -> the cache; the model with its commit, and its folder there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Unseen(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))

    has_bars = any(name.endswith(".safetensors") for name in names)
    with _explaining(model, is_online):
        folder = snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=list(names),
            local_files_only=not is_online,
            tqdm_class=None if has_bars else Unseen,
        )
    return model.at(Path(folder).name), Path(folder)


@contextmanager
def _explaining(model: HubModel, is_online: bool) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # those of huggingface_hub, and of the HTTP client and the disk below it
        raise _explained(error, model, is_online) from error


def _explained(error: Exception, model: HubModel, is_online: bool) -> ConfigError:
    """What went wrong with the Hub or its cache, as one line that says what to do."""
    from huggingface_hub import constants, errors, is_offline_mode

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            return _explained(error.__cause__, model, is_online)
        is_online = False
    what, hub, cache = f"model.path is {str(model)!r}", constants.ENDPOINT, constants.HF_HUB_CACHE
    page = f"{hub}/{model.repo}"
    by_hand = f"`hf download {model.repo}" + (f" --revision {model.revision}`" if model.revision else "`")
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(f"{what}, which is gated: accept its terms at {page}, then `hf auth login` as who did")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{what}, but {page} has no such revision: wanted one of its branches, tags or commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"{what}: there is no such folder here, and no model at {page} that you may see: correct the name; "
            "if it is private, `hf auth login` first"
        )
    if isinstance(error, errors.HfHubHTTPError):
        refused = error.response.status_code in (401, 403)
        advice = "`hf auth login` with a token that may read it" if refused else "try again later"
        return ConfigError(f"{what}, but {hub} answers {error.response.status_code} ({_short(error)}): {advice}")
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{what}: there is no such folder here, and it is no id of the Hub either ({_short(error)})")
    if isinstance(error, errors.LocalEntryNotFoundError) and not is_online:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{hub} cannot be reached"
        advice = "unset it" if is_offline_mode() else "connect to it"
        return ConfigError(
            f"{what}: there is no such folder here, {why}, and the cache {cache} does not have all of the model: "
            f"{advice}, or run {by_hand} where there is a network and bring that cache here (HF_HUB_CACHE)"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return ConfigError(
            f"{what}, which cannot be written to the cache {cache} ({error.strerror}): make room, or set HF_HOME to a "
            "folder on another disk"
        )
    return ConfigError(
        f"{what}, whose download from {hub} broke off ({_short(error)}): start again, whole files are kept; or run "
        f"{by_hand} first"
    )


def _short(error: Exception) -> str:
    """One line of at most 200 characters."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
