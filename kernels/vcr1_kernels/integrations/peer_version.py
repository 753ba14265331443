"""Which releases of another trainer a drop-in was tested with: their internals change from one to the next."""

from __future__ import annotations

import re
from importlib import metadata


def check_version(package: str, lowest: str, below: str) -> None:
    """Raises: ImportError when `package` is not installed, or not of a version in [lowest, below); names both."""
    wanted = f"{package} >= {lowest}, < {below}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; this drop-in is tested with {wanted}") from None
    if not _numbers(lowest) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"found {package} {found}, wanted {wanted}: this drop-in stands in for internals of {package} and is only "
            "right for releases it was tested with; install one of those, or a newer vcr1_kernels"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 16, 0) of `1.16.0.dev3+cpu`: the release numbers alone, padded to three."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release.group().split(".")] if release else []
    return (*numbers, 0, 0, 0)[: max(len(numbers), 3)]
