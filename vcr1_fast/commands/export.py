"""`vcr1-fast export`: a checkpoint of a run -> the folder that Hugging Face loads, or PEFT's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.export import export_adapter
from vcr1_fast.run.named_model import checkpoint_of
from vcr1_fast.run.opened_checkpoint import open_checkpoint
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.types import RunError


def export_command(name: str, out: str, dtype: str | None, *, merges: bool, repo: str | None) -> dict[str, Any]:
    """Write the checkpoint `name` (of a run: its newest) to `out`, and push that to the Hub where `repo` is given.

    dtype: of the weights, None as the run's own export has it. merges: false writes the adapter alone.
    Raises ConfigError, OSError when `out` cannot be written, RunError when it cannot be pushed.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{out} exists, wanted a folder that does not: nothing is written over")
    if dtype and not merges:
        raise ConfigError("--dtype is of a merged model; an adapter is written in float32: leave one of the two out")
    checkpoint = checkpoint_of(name)
    opened = open_checkpoint(checkpoint, SINGLE_PROCESS)
    model = opened.config.model
    if not merges and not model.lora.rank:
        raise ConfigError(f"{checkpoint} was trained without LoRA, so there is no adapter: leave --no-merge out")
    if folder.exists():
        folder.rmdir()  # empty, see above
    if merges:
        opened.export(folder, dtype, SINGLE_PROCESS)
    else:
        export_adapter(opened.policy, folder, model.lora, model.path, SINGLE_PROCESS)
    result = {"checkpoint": str(checkpoint), "folder": str(folder)}
    return result | ({"pushed": push(folder, repo)} if repo else {})


def push(folder: Path, repo: str) -> str:
    """Upload the folder to a repository of the Hugging Face Hub, which is made if need be. Gives its address.

    Raises RunError; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except Exception as error:  # offline, not logged in, no such name: each client library has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{folder} is written, but could not be pushed to {repo} ({type(error).__name__}: {reason}): "
            f"hf auth login, then hf upload {repo} {folder}"
        ) from error
