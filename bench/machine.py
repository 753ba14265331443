"""What a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers


def machine_card() -> dict[str, str | int]:
    """Device, cores, library versions and the commit of the checkout (`-dirty` with uncommitted changes)."""
    is_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0).replace(" ", "-") if is_cuda else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    """Short hash, or `unknown` outside a checkout and without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"
