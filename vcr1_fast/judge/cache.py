"""Answers of the judge on disk, keyed by what was asked. Shared by threads, processes and runs. Called by client.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import sys
import threading
import zlib
from pathlib import Path

BUSY_TIMEOUT_S = 10.0  # how long to wait for another process that writes; a write takes milliseconds


def cache_key(model: str, prompt: str) -> str:
    """SHA-256 of model and prompt. The server's address is left out: the same model elsewhere says the same."""
    return hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()


def _checksum(key: str, answer: str) -> int:
    return zlib.crc32(f"{key} {answer}".encode())  # SQLite has none of its own


class AnswerCache:
    """key -> text. A cache that cannot be opened, read or written is reported once and left unused: never an error.

    One SQLite file with its default rollback journal, which also works on network file systems (WAL does not).
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create `path`; None keeps the answers in memory."""
        self.path = path
        self._lock = threading.Lock()  # one connection for all threads
        self._connection: sqlite3.Connection | None = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                ":memory:" if path is None else path,
                timeout=BUSY_TIMEOUT_S,
                check_same_thread=False,
                isolation_level=None,  # every statement is a transaction of its own
            )
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS checked "
                "(key TEXT PRIMARY KEY, answer TEXT NOT NULL, crc32 INTEGER NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, key: str) -> str | None:
        """The stored answer; None without one, and where the disk has changed it."""
        with self._lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute("SELECT answer, crc32 FROM checked WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                self._give_up(error)
                return None
        return row[0] if row and isinstance(row[0], str) and row[1] == _checksum(key, row[0]) else None

    def put(self, key: str, answer: str) -> None:
        """Store an answer; the newest stays."""
        with self._lock:
            if self._connection is None:
                return
            try:
                row = (key, answer, _checksum(key, answer))
                self._connection.execute("INSERT OR REPLACE INTO checked VALUES (?, ?, ?)", row)
            except UnicodeEncodeError:  # half a character, which JSON can say and UTF-8 cannot: asked again next time
                return
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _give_up(self, error: Exception) -> None:
        self._drop()
        print(
            f"the judge's cache {self.path} cannot be used and is left out: {error}; delete the file or name another "
            "in judge.cache",
            file=sys.stderr,
        )

    def _drop(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None
