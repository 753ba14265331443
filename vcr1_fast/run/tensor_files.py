"""Tensors -> one safetensors file, as any other file is written: its errors are OSErrors, its mode is the folder's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises OSError when it cannot be written: safetensors has an error of its own for a full disk, which is none."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    with contextlib.suppress(PermissionError):  # of a file system that has no modes
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for this user alone
