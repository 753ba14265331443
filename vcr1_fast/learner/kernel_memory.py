"""Remembers on disk which kernels held their comparison here, so that only the first run of a machine spends the time.

One small JSON file for each GPU model, set of versions and set of shapes. Nothing depends on it: a file that is broken,
absent or cannot be written costs a comparison.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import vcr1_kernels

from vcr1_fast import __version__

PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
OWN_SOURCES = (
    "attention.py", "tower_attention.py", "kernel_problems.py", "kernel_proof.py", "kernel_memory.py",
    "liger_ops.py", "model_operators.py", "operator_problems.py",
)  # fmt: skip
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one way of one kernel."""

    kernel: str
    way: str
    outcome: Literal["held", "failed", "crashed"]  # crashed: the GPU's context is lost with it
    reason: str = ""  # why it did not hold
    output: str = ""  # the one nearest to its bound, or one beyond it
    distance: float = 0.0  # of that output from float64, relative
    plain_distance: float = 0.0  # of the plain path
    allowed: float = 0.0

    def numbers(self) -> str:
        return f"{self.distance:.1e} from float64, allowed {self.allowed:.1e}, plain path {self.plain_distance:.1e}"


class Memory:
    """`recall` of what `keep` was given under the same key, by this process or an earlier one."""

    def __init__(self, key: Mapping[str, Any]) -> None:
        """`key`: JSON values. Everything that could change an outcome belongs into it."""
        self._key = json.loads(json.dumps(key))
        name = hashlib.blake2b(json.dumps(self._key, sort_keys=True).encode(), digest_size=12).hexdigest()
        folder = cache_folder()
        self._path = folder / f"{name}.json" if folder is not None else None

    def recall(self) -> dict[tuple[str, str], Verdict]:
        """By kernel and way. Empty when there is no file, or one that says something else."""
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["key"] != self._key:
                return {}
            verdicts = [Verdict(**row) for row in content["verdicts"]]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {(v.kernel, v.way): v for v in verdicts if v.outcome in ("held", "crashed")}

    def keep(self, verdicts: Iterable[Verdict]) -> None:
        """Replaces what was there. What failed is left out: it is tried again, for its cause may have gone."""
        rows = [asdict(v) for v in verdicts if v.outcome in ("held", "crashed")]
        if self._path is None or not rows:
            return
        written = self._path.with_name(f"{self._path.name}.{os.getpid()}")  # ranks of one machine write at once
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps({"key": self._key, "verdicts": rows}, indent=1), encoding="utf-8")
            written.replace(self._path)


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/vcr1-fast/kernels`, by default below ~/.cache; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"  # XDG ignores relative paths
        return base / "vcr1-fast" / "kernels"
    return None


def machine_key(device: torch.device) -> dict[str, Any]:
    """The GPU, and every version that has a part in what a kernel computes."""
    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "capability": list(torch.cuda.get_device_capability(device)) if is_cuda else [],
        "driver": _driver() if is_cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "vcr1_fast": __version__,
        "sources": sources_digest(),
    }


def _driver() -> str:
    try:
        words = DRIVER_FILE.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", words)
    return found.group() if found else words


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def sources_digest() -> str:
    """Of the kernels' sources and of what compares them."""
    package = Path(vcr1_kernels.__file__).parent
    paths = [*sorted(package.rglob("*.py")), *(Path(__file__).parent / name for name in OWN_SOURCES)]
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
