"""Loads shim.cpp into this process, compiled at first use. Imports no torch: its libraries must come after the shim's.

| torch              | machine     | shim                                                       |
|--------------------|-------------|------------------------------------------------------------|
| built without CUDA | any         | device guard and hooks                                     |
| built with CUDA    | with a GPU  | none: the guard in it works                                |
| built with CUDA    | without one | device guard and hooks, in the place of those inside       |
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")


class FakeGpuError(Exception):
    """The learner cannot be run on fake GPUs here; the message says why and what would help."""


def load() -> None:
    """Prepare this process for fake CUDA tensors. To be called before anything imports torch.

    Raises FakeGpuError where that is not possible.
    """
    if "torch" in sys.modules:
        raise FakeGpuError("torch was imported already, wanted the shim before it: start a process of its own")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FakeGpuError("torch is not installed")
    torch_folder = Path(spec.origin).parent
    version = (torch_folder / "version.py").read_text(encoding="utf-8")
    has_cuda = re.search(r"^cuda\b[^=]*=\s*['\"]", version, flags=re.MULTILINE) is not None
    if has_cuda and _has_gpu():
        return
    library = _build(torch_folder, version)
    names = ["libc10.so", "libtorch_cpu.so", *(["libc10_cuda.so", "libtorch_cuda.so"] if has_cuda else [])]
    for name in names:
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def _build(torch_folder: Path, version: str) -> Path:
    """The compiled shim for this torch, from the user's cache folder; 6 s the first time."""
    source = SOURCE.read_bytes()
    digest = hashlib.blake2b(source + version.encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcr1-fast"
    library = cache / f"fake_cuda-{digest}.so"
    if library.is_file():
        return library
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise FakeGpuError("found no C++ compiler: install g++, or name one in CXX")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(tempfile.mkdtemp(prefix="vcr1-fast-"))  # compiled anew by every process, but it works
        library = cache / library.name
    aside = cache / f"{library.name}.{os.getpid()}"
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20"]
    command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", str(SOURCE), "-o", str(aside)]
    done = subprocess.run([*command, f"-L{lib}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise FakeGpuError(f"{compiler} cannot compile the shim: {' '.join(lines[:1])[:300]}")
    aside.replace(library)
    return library
