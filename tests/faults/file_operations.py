"""Loads file_operations.c into this process and all that it forks: the n-th thing done to files below a folder fails.

What a program does to files is counted where it leaves the program, at the C library, so that safetensors' Rust and
torch's C++ are counted like Python. Nothing in the product knows of it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("file_operations.c")
COUNT, KILL, FAIL_ONCE, FAIL_FROM = range(4)


def start_again_with_it(module: str, folder: Path) -> None:
    """Compile it into `folder` and replace this process by `python -m module` with it; returns without a compiler.

    Only a library that is there before the first one is found by all of them.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if is_loaded() or compiler is None:
        return
    library = folder / "file_operations.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-w", str(SOURCE), "-o", str(library)]
    done = subprocess.run([*command, "-ldl"], capture_output=True, text=True)
    if done.returncode:
        print(f"faults: {compiler} cannot compile {SOURCE.name}: {done.stderr[:300]}", file=sys.stderr)
        return
    environment = os.environ | {"LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def is_loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "faults_arm")


def arm(folder: Path, at: int, action: int, error: int = 0) -> None:
    """From now on: `action` at operation number `at` below `folder`, counted from 1; `error` is what a failure says."""
    library = ctypes.CDLL(None)
    library.faults_arm(str(folder).encode(), ctypes.c_long(at), action, error)


def count() -> int:
    """Operations since `arm`."""
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    return library.faults_count()
