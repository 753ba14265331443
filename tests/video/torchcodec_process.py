"""Runs tests in a process in which torchcodec finds FFmpeg's libraries: those inside PyAV's wheel.

torchcodec brings none of its own and looks for them by plain names (libavcodec.so.62), PyAV's have a hash in theirs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import av

LIBRARIES = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")


def link_libraries(folder: Path) -> Path | None:
    """Fill `folder` with links libavcodec.so.62 -> PyAV's; the folder of PyAV's, None if PyAV was built otherwise."""
    bundled = Path(av.__file__).parent.parent / "av.libs"
    for name in LIBRARIES:
        found = sorted(bundled.glob(f"lib{name}-*.so.*"))
        if len(found) != 1 or (version := re.search(r"\.so\.(\d+)", found[0].name)) is None:
            return None
        (folder / f"lib{name}.so.{version[1]}").symlink_to(found[0])
    return bundled


def run_python(arguments: list[str], libraries: tuple[Path, Path]) -> subprocess.CompletedProcess[str]:
    search = ":".join(map(str, libraries))  # the second too: PyAV's libraries look for each other by their own names
    environment = os.environ | {"LD_LIBRARY_PATH": search}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
