"""The list of files that could not be used, kept on disk so that later runs do not try them again.

Apart from those whose reason may be over by then (`PASSING`), which every start looks at again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from vcr1_fast.settings.error import ConfigError
from vcr1_fast.types import SampleError

logger = logging.getLogger(__name__)

# Reason in words -> its class, for counts. The first pattern that is found decides.
REASON_CLASSES = (
    ("error", r"\braised \w+: "),  # of a program, which says little about the file
    ("annotation", r"^its period (begins|ends) at|^its prompt is too long"),
    ("missing", r"no such file|cannot be opened"),
    ("empty", r"is empty|0 bytes|holds no image"),
    ("timeout", r"did not finish within"),
    ("crash", r"crashed on it|failed on it"),
    ("too_large", r"max_source_pixels|max_group_tokens|sides that differ|MemoryError|Cannot allocate memory"),
    ("no_video", r"has no video track|is a directory|not a regular file"),
    ("not_a_video", r"is not a video file|is not an MP4"),
    ("damaged", r"damaged|cut short|wanted frames cannot be decoded|not one frame can be decoded|is missing"),
    ("not_decodable", r"no decoder for|cannot decode it|wrong frames|decoder"),
)
OTHER = "other"
PASSING = ("error", "missing", "annotation")  # a disk that is not mounted, a file or setting that was mended
REASON_NAMES = (*(name for name, _ in REASON_CLASSES), OTHER)
NUM_NAMES_SHOWN = 5


def reason_class(reason: str) -> str:
    """One of `REASON_NAMES`."""
    return next((name for name, pattern in REASON_CLASSES if re.search(pattern, reason)), OTHER)


class Quarantine:
    """A set of sources (file, or file:row) with a file behind it: one JSON object {source, reason, time} a line.

    Several processes may append to one file; each knows the others' entries from the time it was started.
    """

    def __init__(self, path: Path | None, further: str | Path | None = None, retry: bool = False) -> None:
        """Load `path` if it exists; None keeps the list in memory only. Lines that cannot be read are reported.

        `further` is one more list to honour, only read. Entries of either whose reason is in PASSING, with `retry` all
        of them, do not count until their file fails again. Raises ConfigError when `further` is not there.
        """
        self.path = path
        self.reasons: dict[str, str] = {}  # source -> why, of those that are not to be read
        self._on_disk: dict[str, str] = {}  # source -> why, as `path` says
        if path is not None and path.exists():
            self._on_disk = dict(read_list(path))
        if further is not None and not Path(further).is_file():
            raise ConfigError(
                f"data.quarantine is {further}, which is not there: name a quarantine.jsonl, or leave it out"
            )
        known = {**(dict(read_list(Path(further))) if further is not None else {}), **self._on_disk}
        self.retried = {source: why for source, why in known.items() if retry or reason_class(why) in PASSING}
        self.reasons = {source: why for source, why in known.items() if source not in self.retried}

    def describe(self) -> str:
        """What it says at the start of a run, in one line; "" where it says nothing."""
        left_out = f"{len(self.reasons)} left out ({_counts(self.reasons)})" if self.reasons else ""
        again = f"{len(self.retried)} looked at again ({_counts(self.retried)})" if self.retried else ""
        advice = "; data.retry_quarantined=true looks at all of them again" if self.reasons else ""
        return f"quarantine: {', '.join(filter(None, (left_out, again)))}{advice}" if left_out or again else ""

    def __contains__(self, source: object) -> bool:
        return source in self.reasons

    def add(self, error: SampleError) -> None:
        """Remember `error.source` and append it to the file at once. A source that is known already is not repeated."""
        if error.source in self.reasons:
            return
        self.reasons[error.source] = error.reason
        if self.path is None or self._on_disk.get(error.source) == error.reason:
            return
        self._on_disk[error.source] = error.reason
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"source": error.source, "reason": error.reason, "time": time}).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path) as file:
            size = os.fstat(file).st_size
            # A writer may have died in the middle of a line.
            is_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, b"\n" * is_cut + line)  # one write: also without locks lines of several processes do not mix

    def add_all(self, errors: Iterable[SampleError]) -> None:
        for error in errors:
            self.add(error)

    def forget(self, sources: Iterable[str]) -> None:
        """These are good by now: take them off the run's own list. The file is rewritten only if it named one."""
        good = {source for source in sources if source in self._on_disk and source not in self.reasons}
        if not good or self.path is None:
            return
        for source in good:
            del self._on_disk[source]
        with _locked(self.path):
            kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _source_of(line) not in good]
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.writelines(kept)
                os.chmod(temporary, self.path.stat().st_mode & 0o777)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise

    def summary(self) -> str:
        """How many sources of each class of reason, and the first few of them; also those that other ranks added."""
        reasons = self.reasons
        if self.path is not None and self.path.exists():
            reasons = {**reasons, **dict(read_list(self.path))}
        lines = [f"  {source}: {reason}" for source, reason in list(reasons.items())[:NUM_NAMES_SHOWN]]
        more = [f"  and {len(reasons) - len(lines)} more"] if len(reasons) > len(lines) else []
        return "\n".join([f"{len(reasons)} files ({_counts(reasons)}):", *lines, *more])


def _counts(reasons: Mapping[str, str]) -> str:
    """Such as "3 missing, 1 empty"."""
    counts = Counter(reason_class(reason) for reason in reasons.values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def read_list(path: Path) -> Iterator[tuple[str, str]]:
    """(source, reason) of each line of a quarantine file. A line that is none is reported and passed over."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            source, reason = entry["source"], entry["reason"]
            if not isinstance(source, str) or not isinstance(reason, str):
                raise TypeError("source and reason must be text")
        except (ValueError, KeyError, TypeError) as error:
            text = line[:80].decode(errors="replace")
            logger.warning("%s line %d is not a quarantine entry and is ignored: %s (%s)", path, number, text, error)
            continue
        yield source, reason


def _source_of(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("source") if isinstance(entry, dict) else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open for appending, while no other process appends to it or replaces it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with contextlib.suppress(OSError):  # a network disk without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(file), os.stat(path))
            except FileNotFoundError:
                is_current = False
            if is_current:  # else it was replaced while this process waited
                yield file
                return
        finally:
            os.close(file)
