"""The name of a video in an annotation row -> the path of its file. Called by `dataset`; opens no video."""

from __future__ import annotations

import os
from pathlib import Path

from vcr1_fast.video.source_name import SourceName

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")  # in the order in which they are tried for a name without one


class VideoFolder:
    """Finds videos under one root. A folder is listed once, as a look at each file takes 1 ms on a network disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self._listings: dict[str, frozenset[str]] = {}

    def find(self, video: str) -> str:
        """Absolute path of a video file or a folder of images. It need not exist: reading it will tell.

        A relative path starts from the root; if it has no suffix of a video and does not exist as it is, it gets the
        first suffix under which there is a file, .mp4 if there is none. An absolute path that does not exist, as in
        files from another machine, is replaced by its last part under the root where that exists. A fragment behind the
        path ("#images=7&fps=2") stays there.
        """
        path = SourceName.parse(video).path
        return self._find(path) + video[len(path) :]

    def _find(self, video: str) -> str:
        path = os.path.expanduser(video)
        if os.path.isabs(path):
            name = os.path.basename(path)
            is_elsewhere = name in self._listing(self.root) and not os.path.exists(path)
            return os.path.join(self.root, name) if is_elsewhere else os.path.abspath(path)
        path = os.path.abspath(os.path.join(self.root, path))
        folder, name = os.path.split(path)
        names = self._listing(folder)
        if name in names or name.lower().endswith(SUFFIXES):
            return path
        return path + next((suffix for suffix in SUFFIXES if name + suffix in names), SUFFIXES[0])

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):  # not there, or no path at all: the reader of the video will say so
                self._listings[folder] = frozenset()
        return self._listings[folder]
