"""decord, the reader the original training used, in a worker process that can be killed.

decord can loop for ever inside C++ while it holds the GIL (a container that lists more frames than it has), so no
thread and no signal handler of its own process can stop it: after `timeout_s` the worker gets SIGKILL, the file a
SampleError, and the next file a fresh worker.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vcr1_fast.run.stop_signals import kept_from_children
from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import SampleError
from vcr1_fast.video.pyav_reader import PyavReader
from vcr1_fast.video.reader import Probe, ReaderError, require_video_file

WORKER_COMMAND = (sys.executable, "-m", "vcr1_fast.video.decord_worker")
START_LIMIT_S = 120.0  # importing numpy and decord takes 0.3 s on an idle machine; a cold network disk is slow
MAX_HEADER_BYTES = 1 << 20
PART_BYTES = 256 << 20  # of frames that a worker holds at once, see decord_worker; 41 of 1080p
MAGIC_BYTES = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"), (0, b"\x1aE\xdf\xa3"))


class DecordReader:
    """Workers are started when first needed, one per thread that reads at the same time, and kept until `close`."""

    def __init__(
        self,
        timeout_s: float,
        worker_command: Sequence[str] = WORKER_COMMAND,
        max_source_pixels: int = VideoConfig.max_source_pixels,
        clips_per_worker: int = VideoConfig.clips_per_worker,
    ) -> None:
        """`timeout_s`: longest wait for one `probe`, and for the frames of one `read`, in seconds.
        `clips_per_worker`: a worker is replaced after so many reads, for what decord may leak.

        Raises ModuleNotFoundError when decord is not installed.
        """
        try:
            self.name = f"decord {importlib.metadata.version('decord')}"
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(
                "video.reader is decord, but decord is not installed: pip install decord, or set video.reader to pyav"
            ) from error
        self.timeout_s, self.clips_per_worker = timeout_s, clips_per_worker
        self._pyav = PyavReader(max_source_pixels)
        self._worker_command = tuple(worker_command)
        self._idle: list[_Worker] = []
        self._pid = os.getpid()

    def probe(self, path: str) -> Probe:
        """See `Reader.probe`. Times come from PyAV, and a file of which decord gives wrong frames is refused.

        Measured with decord 0.6.0: AVI gives frames up to 30 places off, MPEG-TS starts at its second keyframe, and
        the frames that an edit list hides are counted, with other frames in their place. What it cannot tell: a frame
        that FFmpeg repaired after damage looks to it like any other. PyAV refuses those.
        """
        probe = replace(self._pyav.probe(path), ticks=None)
        _require_mp4_or_matroska(path)
        if not probe.is_turned_only:
            raise SampleError(path, "is to be shown mirrored or slanted, decord only turns; set video.reader to pyav")
        [(message, _)] = self._ask(path, None, 1)
        got = (message["num_frames"], message["width_px"], message["height_px"])
        wanted = (len(probe.times_s), probe.width_px, probe.height_px)
        if got != wanted:
            raise SampleError(
                path,
                "decord sees {} frames of {} x {} px where {} of {} x {} are shown (an edit list?) and would give the "
                "wrong ones; set video.reader to pyav, or convert the file".format(*got, *wanted),
            )
        return probe

    def read(self, probe: Probe, frame_indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.read`."""
        require_video_file(probe.path)
        num_at_once = max(1, PART_BYTES // (3 * probe.height_px * probe.width_px))
        for message, raw in self._ask(probe.path, [int(i) for i in frame_indices], num_at_once):
            yield from np.frombuffer(raw, dtype=np.uint8).reshape(message["shape"])

    def close(self) -> None:
        """End the idle workers."""
        while self._idle and self._pid == os.getpid():
            self._idle.pop().kill()

    def _ask(
        self, path: str, indices: list[int] | None, num_at_once: int
    ) -> Iterator[tuple[dict[str, Any], bytearray]]:
        """The messages that answer one request; a worker that failed or was left in the middle is killed."""
        worker = self._take_worker()
        left_s, is_in_step = self.timeout_s, False
        try:
            limits = {"num_at_once": num_at_once, "give_up_s": self.timeout_s + 10}
            worker.send({"path": path, "indices": indices, **limits})
            worker.num_reads += indices is not None
            while not is_in_step:
                asked_at = time.monotonic()
                message, raw = worker.receive(left_s)
                left_s -= time.monotonic() - asked_at  # what the caller does with a frame does not count
                if message["kind"] == "error":
                    raise SampleError(path, _in_plain_words(message["reason"]))
                is_in_step = message["kind"] in ("probe", "end")
                if message["kind"] != "end":
                    yield message, raw
        except TimeoutError as error:
            reason = f"decord did not finish within {self.timeout_s:g} s (video.timeout_s) and was killed"
            raise SampleError(path, reason) from error
        except (OSError, EOFError, ValueError) as error:  # ValueError: a message that is not JSON
            raise SampleError(path, f"decord crashed on it ({worker.kill()}); is the file damaged?") from error
        finally:
            if is_in_step and worker.num_reads < self.clips_per_worker:
                self._idle.append(worker)
            else:
                worker.kill()

    def _take_worker(self) -> _Worker:
        if self._pid != os.getpid():  # forked: the pipes belong to the parent process
            self._idle, self._pid = [], os.getpid()
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return _Worker(self._worker_command)
            if worker.process.poll() is None:
                return worker
            worker.kill()


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, command: tuple[str, ...]) -> None:
        """Raises ReaderError when the process does not report ready."""
        # An own session, so that Ctrl-C ends the run in order and does not tear the worker away in the middle.
        with kept_from_children():
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout_fd = self.process.stdin, self.process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout_fd, selectors.EVENT_READ)
        self._unread = bytearray()
        self.num_reads = 0
        try:
            message, _ = self.receive(START_LIMIT_S)
            problem = None if message["kind"] == "ready" else message.get("reason", "it sent something else")
        except (TimeoutError, EOFError, ValueError) as error:
            problem = str(error)
        if problem is not None:
            ending = self.kill()
            raise ReaderError(
                f"the decord worker did not start: {problem} ({ending}); try `{' '.join(command)}` by hand, "
                "or set video.reader to pyav"
            )

    def send(self, request: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(request).encode() + b"\n")

    def receive(self, limit_s: float) -> tuple[dict[str, Any], bytearray]:
        """The next message and its bytes. Raises TimeoutError after `limit_s`, EOFError when the process ended."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            if len(self._unread) > MAX_HEADER_BYTES:
                raise EOFError("the worker sent no message header")
            self._unread += self._read_some(1 << 16, deadline)
        header, _, rest = self._unread.partition(b"\n")
        message = json.loads(header)
        raw = bytearray(message["num_bytes"])
        num_read = min(len(rest), len(raw))
        raw[:num_read] = rest[:num_read]
        self._unread = rest[num_read:]
        while num_read < len(raw):
            piece = self._read_some(min(1 << 20, len(raw) - num_read), deadline)
            raw[num_read : num_read + len(piece)] = piece
            num_read += len(piece)
        return message, raw

    def _read_some(self, max_bytes: int, deadline: float) -> bytes:
        if not self._selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("no answer in time")
        piece = os.read(self._stdout_fd, max_bytes)
        if not piece:
            raise EOFError("the process ended")
        return piece

    def kill(self) -> str:
        """End the process now, whatever it does; returns how it ended, in words."""
        code = self.process.poll()
        if code is None:
            self.process.send_signal(signal.SIGKILL)
            code = self.process.wait()
        self._selector.close()
        self._stdin.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _require_mp4_or_matroska(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    if not any(start[offset:].startswith(magic) for offset, magic in MAGIC_BYTES):
        raise SampleError(
            path,
            "is not an MP4, MOV, Matroska or WebM file, and decord gives wrong frames of others (AVI, MPEG-TS); "
            "set video.reader to pyav",
        )


def _in_plain_words(reason: str) -> str:
    """One line without the times and source lines of decord's C++ traces."""
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", reason.split("Stack trace")[0])
    return f"decord cannot decode it: {' '.join(text.split())[:200]}"
