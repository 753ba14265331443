"""What `model.path` names on the Hugging Face Hub, and where the Hub's cache has it. No network: see hub.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# As huggingface_hub.utils.validate_repo_id allows, with an owner: bare names such as gpt2 are names of folders, too.
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{,95}/[A-Za-z0-9_][\w.-]{,95})(@(?P<revision>[^\s@]{1,200}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hub; as a text it is what `model.path` may say."""

    repo: str  # owner/name
    revision: str | None = None  # branch, tag or commit; None: the default branch

    @property
    def is_pinned(self) -> bool:
        """Whether it names one commit, whose files never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubModel:
        return HubModel(self.repo, commit)

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def hub_model(path: str) -> HubModel | None:
    """The model of the Hub that a path has the shape of, `owner/name` or `owner/name@revision`.

    None for all others, and where there is a folder of that name here.
    """
    shape = _ID.fullmatch(path)
    if shape is None or Path(path).exists():
        return None
    return HubModel(shape["repo"], shape["revision"])


def cached_file(model: HubModel, name: str) -> Path | None:
    """A file of a pinned model in the Hub's cache (HF_HUB_CACHE), if it is there whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, name, revision=model.revision) if model.is_pinned else None
    return Path(found) if isinstance(found, str) else None  # it gives a mark for a file that the repository lacks
