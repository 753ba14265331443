"""The list of files that could not be used, kept on disk so that later runs do not try them again."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from vcr1_fast.types import SampleError

logger = logging.getLogger(__name__)


class Quarantine:
    """A set of sources (file, or file:row) with a file behind it: one JSON object {source, reason, time} a line.

    Several processes may append to one file; each knows the others' entries from the time it was started.
    """

    def __init__(self, path: Path | None) -> None:
        """Load `path` if it exists; None keeps the list in memory only. Lines that cannot be read are reported."""
        self.path = path
        self.reasons: dict[str, str] = {}  # source -> why
        self._must_end_line = False
        if path is not None and path.exists():
            self._load(path)

    def __contains__(self, source: object) -> bool:
        return source in self.reasons

    @property
    def num_bad(self) -> int:
        """Different sources known to be bad, those of earlier runs included."""
        return len(self.reasons)

    def add(self, error: SampleError) -> None:
        """Remember `error.source` and append it to the file at once. A source that is known already is not repeated."""
        if error.source in self.reasons:
            return
        self.reasons[error.source] = error.reason
        if self.path is None:
            return
        entry = {
            "source": error.source,
            "reason": error.reason,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        line = ("\n" if self._must_end_line else "") + json.dumps(entry) + "\n"
        self._must_end_line = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())  # one write with O_APPEND: lines of several processes do not mix
        finally:
            os.close(file)

    def _load(self, path: Path) -> None:
        raw = path.read_bytes()
        self._must_end_line = not raw.endswith(b"\n") and len(raw) > 0  # a writer died in the middle of a line
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                source, reason = entry["source"], entry["reason"]
                if not isinstance(source, str) or not isinstance(reason, str):
                    raise TypeError("source and reason must be text")
            except (ValueError, KeyError, TypeError) as error:
                text = line[:80].decode(errors="replace")
                logger.warning(
                    "%s line %d is not a quarantine entry and is ignored: %s (%s)", path, number, text, error
                )
                continue
            self.reasons[source] = reason
