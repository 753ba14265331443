"""The name of a video or an image in an annotation row -> the path of its file. Called by `row_media`; opens none."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from vcr1_fast.video.source_name import SourceName

SUFFIXES = (
    *(".mp4", ".mkv", ".webm", ".avi"),  # in the order in which they are tried for a name without one
    *(".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv", ".vob", ".gif"),
)
MAX_INDEXED = 2_000_000  # files and folders below the root; 100,000 take 0.3 s on a local disk
MAX_ALIKE = 64  # of which it is looked whether they are links to one file
NUM_SHOWN = 4  # candidates in a message
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_ADDRESS = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)


class VideoTree:
    """What lies below a root. A folder is listed once, as a look at each file takes 1 ms on a network disk."""

    def __init__(self, root: str | Path, suffixes: Sequence[str] = SUFFIXES) -> None:
        """`suffixes`: of the files looked for, in the order in which they are tried for a name without one."""
        self.root, self.suffixes = os.path.abspath(os.path.expanduser(root)), tuple(suffixes)
        self._listings: dict[str, frozenset[str]] = {}
        self._endings: dict[str, dict[str, list[str]]] = {}  # folder -> names by `_plain`
        # `_plain` of a name -> its folders, the nearest first, and path from the root, sorted; once needed
        self._index: dict[str, list[tuple[str, str]]] | None = None

    def in_folder(self, path: str) -> str | None:
        """The file or folder at an absolute path, under another suffix or its suffix in other letters if need be.

        Raises ValueError when there are several.
        """
        folder, name = os.path.split(path)
        names = self._listing(folder)
        if name in names or (not names and os.path.lexists(path)):  # a folder may be closed to listing only
            return path
        if folder not in self._endings:
            self._endings[folder] = defaultdict(list)
            for other in names:
                self._endings[folder][self._plain(other)].append(other)
        endings = self._endings[folder]
        found = [
            (rank, os.path.join(folder, other))
            for rank, key in enumerate(self._keys(name))
            for other in endings.get(key, ())
        ]
        return self._pick(path, found) if found else None

    def by_end(self, path: str) -> tuple[str, int] | None:
        """The path below the root that shares most of its last parts with an absolute path; and how many those are.

        Raises ValueError when there are several, or too much lies below the root.
        """
        folder, name = os.path.split(path)
        index = self._indexed()
        keys = [(rank, key) for rank, key in enumerate(self._keys(name)) if key in index]
        nearest = _nearest_first(folder)
        for num_shared in range(nearest.count(os.sep), -1, -1):
            shared = nearest[: _place_behind(nearest, num_shared)]
            found: list[tuple[int, str]] = []
            for rank, key in keys:
                alike = index[key]
                start = bisect_left(alike, (shared,))
                for folders, other in alike[start : start + MAX_ALIKE + 1]:
                    if not folders.startswith(shared):
                        break
                    found.append((rank, os.path.join(self.root, other)))
            if found:
                return self._pick(path, found), num_shared + 1
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):  # not there, or no path at all: the reader of the video will say so
                self._listings[folder] = frozenset()
        return self._listings[folder]

    def _indexed(self) -> dict[str, list[tuple[str, str]]]:
        if self._index is None:
            index: dict[str, list[tuple[str, str]]] = defaultdict(list)
            for number, path in enumerate(_below(self.root, self.suffixes)):
                if number == MAX_INDEXED:
                    raise ValueError(
                        f"more than {MAX_INDEXED:,} files lie below {self.root}, too many to look for a path from "
                        "another machine: set data.video_root to a folder of videos"
                    )
                folder, name = os.path.split(path)
                index[self._plain(name)].append((_nearest_first(folder), path))
            for alike in index.values():
                alike.sort()
            self._index = dict(index)
        return self._index

    def _plain(self, name: str) -> str:
        """The name with its suffix in small letters, where it is one of those that are looked for."""
        stem, suffix = os.path.splitext(name)
        return stem + suffix.lower() if suffix.lower() in self.suffixes else name

    def _keys(self, name: str) -> list[str]:
        """`_plain` of the names under which a file may be found, in their order."""
        plain = self._plain(name)
        return [plain] if plain.endswith(self.suffixes) else [name, *(name + suffix for suffix in self.suffixes)]

    def _pick(self, path: str, found: list[tuple[int, str]]) -> str:
        """The one of several (place in `_keys`, absolute path) that is meant. Raises ValueError if unclear."""
        wanted = os.path.basename(path)

        def oddness(other: str) -> int:
            name = os.path.basename(other)
            return 0 if name == wanted else 1 if name == self._plain(name) else 2

        ordered = sorted((rank, oddness(other), other) for rank, other in found)
        if 1 < len(ordered) <= MAX_ALIKE:  # links to one file are one
            distinct: dict[str, tuple[int, int, str]] = {}
            for entry in ordered:
                distinct.setdefault(os.path.realpath(entry[2]), entry)
            ordered = list(distinct.values())
        others = [other for _, _, other in ordered]
        is_first_best = len(ordered) == 1 or ordered[0][:2] < ordered[1][:2]
        if is_first_best and len({os.path.dirname(other) for other in others}) == 1:
            return others[0]
        raise ValueError(
            f"video {path} is not there, and {'over ' * (len(others) > MAX_ALIKE)}{min(len(others), MAX_ALIKE)} others "
            f"may be meant: {', '.join(others[:NUM_SHOWN])}{', ...' if len(others) > NUM_SHOWN else ''}: name one of "
            "them, or set data.video_root to the folder it is in"
        )


class VideoFolder:
    """Finds the videos that one annotation file names."""

    def __init__(self, root: str | Path, tree: VideoTree | None = None) -> None:
        """`tree`: of this root, where another file has one."""
        self.tree = tree or VideoTree(root)
        self._found: dict[str, str | ValueError] = {}
        self._moved: dict[str, tuple[str, int]] = {}  # path in the annotation -> file, and how many parts they share

    def find(self, video: str) -> str:
        """Absolute path of a video file or a folder of images. It need not exist: reading it will tell.

        A relative path starts from the root. Where there is nothing under a name, its suffix may be missing or written
        in other letters; if that finds nothing, a name without one gets .mp4. An absolute path that does not exist, as
        in files from another machine, becomes the file below the root that shares most of its last parts. file:// is a
        path; a fragment behind it ("#images=7&fps=2") stays there.

        Raises ValueError when several files fit equally well, or the name is no path.
        """
        if video not in self._found:
            try:
                self._found[video] = self._find(video)
            except ValueError as error:
                self._found[video] = error
        found = self._found[video]
        if isinstance(found, ValueError):
            raise ValueError(str(found))
        return found

    def tell_apart(self, videos: Iterable[str]) -> None:
        """Refuse, of these names, all those of absolute paths from elsewhere that would become one file.

        Of "/their/a/1.mp4" and "/their/b/1.mp4" at most one is the "1.mp4" below the root: none, unless one of them
        shares more of its last parts. To be called with all names of an annotation file.
        """
        path_of = {video: SourceName.parse(video).path for video in dict.fromkeys(videos)}
        for video in path_of:
            try:
                self.find(video)
            except ValueError:
                continue  # `find` will raise it again
        rivals: dict[str, dict[str, int]] = defaultdict(dict)
        for path, (file, num_shared) in self._moved.items():
            rivals[file][path] = num_shared
        refused: dict[str, ValueError] = {}
        for file, shared in rivals.items():
            best = max(shared.values())
            keeps_best = list(shared.values()).count(best) == 1
            for path in shared:
                if len(shared) > 1 and not (keeps_best and shared[path] == best):
                    other = next(rival for rival in shared if rival != path)
                    refused[path] = ValueError(
                        f"video {path} is not there, and {file} may be another one, {other}: keep the folders of the "
                        "videos as they are in the annotation file"
                    )
        for video, path in path_of.items():
            if path in refused:
                self._found[video] = refused[path]
        self._moved = {path: moved for path, moved in self._moved.items() if path not in refused}

    def describe_moved(self) -> str:
        """For the summary of a file: how many videos are not where it says; empty if none."""
        if not self._moved:
            return ""
        path, (file, _) = next(iter(self._moved.items()))
        return f"{len(self._moved):,} videos found by the end of their path, such as {file} for {path}"

    def _find(self, video: str) -> str:
        path = SourceName.parse(video).path
        return self._find_path(path) + video[len(path) :]

    def _find_path(self, name: str) -> str:
        path = os.path.expanduser(_local_path(name))
        is_absolute = os.path.isabs(path)
        path = os.path.abspath(os.path.join(self.tree.root, path))
        found = self.tree.in_folder(path)
        if found is None and is_absolute:
            moved = self.tree.by_end(path)
            if moved is not None:
                self._moved[name] = moved
                return moved[0]
        if found is not None:
            return found
        suffixes = self.tree.suffixes
        return path if is_absolute or path.lower().endswith(suffixes) else path + suffixes[0]


def _local_path(name: str) -> str:
    if match := _FILE_ADDRESS.fullmatch(name):
        return unquote(match[1])
    if match := _ADDRESS.match(name):
        raise ValueError(f"video is {name!r:.100}, wanted a file on this machine: fetch it and name its path")
    return name


def _below(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Videos and folders below the root, their paths from there; links are followed, hidden ones left out."""
    waiting, linked = [""], set[str]()
    while waiting:
        folder = waiting.pop()
        folder_path = os.path.join(root, folder)
        try:
            entries = list(os.scandir(folder_path))
        except (OSError, ValueError):
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if target in linked or os.path.commonpath((target, os.path.realpath(folder_path))) == target:
                        continue  # or a loop of links would never end
                    linked.add(target)
                waiting.append(path)
                yield path
            elif entry.name.lower().endswith(suffixes):
                yield path


def _nearest_first(folder: str) -> str:
    """Such as "c/b/a/" of "/a/b/c"."""
    return "".join(part + os.sep for part in reversed(folder.split(os.sep)) if part)


def _place_behind(folders: str, num_parts: int) -> int:
    place = 0
    for _ in range(num_parts):
        place = folders.index(os.sep, place) + 1
    return place
