"""The trainer's end of one `loader_worker`: start it, ask it for a clip, kill it. Used by `FrameLoader`.

A decoder can hang for ever inside C++ while it holds the GIL, crash, or ask for more memory than there is. So it runs
in a process that can be killed at any time, and every clip has a time-out.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import torch

from vcr1_fast.run.stop_signals import kept_from_children
from vcr1_fast.types import Frames, SampleError
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.loader_worker import MAX_MESSAGE_BYTES, Answer, Begun, Ready, WorkerSettings
from vcr1_fast.video.reader import ReaderError
from vcr1_fast.video.shared_memory import map_tensor

START_LIMIT_S = 120.0  # importing torch takes 1.5 s on an idle machine; a cold network disk is slow
START_PAUSES_S = (1.0, 4.0, 16.0)  # before a worker that was killed while it started, or while idle, is started again


class DiedIdleError(Exception):
    """The process ended while it started or waited: no file and no setting is to blame. The message says how."""


class ReaderProcess:
    """One process and the socket to it."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Starts the process and does not wait for it, see `wait_until_ready`. Raises OSError when there is none."""
        self._connection, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child, kept_from_children():
            self._process = subprocess.Popen(
                (sys.executable, "-m", "vcr1_fast.video.loader_worker", str(child.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(child.fileno(),),
                start_new_session=True,  # Ctrl-C ends the run in order and does not tear the worker away in the middle
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self._deadline = time.monotonic() + START_LIMIT_S
        self._settings = settings
        self.pid = self._process.pid
        self.reader_name = ""  # once it is ready
        self.num_answers = 0  # clips and errors it has answered

    def wait_until_ready(self, reader_name: str | None) -> None:
        """Raises RuntimeError when its reader cannot be opened or is not `reader_name` (None: any), DiedIdleError when
        it ended."""
        try:
            self._connection.send(pickle.dumps(self._settings))
            message, _ = self._receive(self._deadline)
            if isinstance(message, Ready) and reader_name in (None, message.reader_name):
                self.reader_name = message.reader_name
                return
        except (EOFError, OSError) as error:
            raise DiedIdleError(f"{error} ({self.close()})") from None
        self.close()
        problem = f"it has the reader {message.reader_name!r}" if isinstance(message, Ready) else str(message)
        raise _not_started(self._settings, reader_name, problem)

    def ask(self, request: ClipRequest, timeout_s: float) -> tuple[Frames, float]:
        """The clip, and the seconds the worker needed.

        Raises SampleError, ReaderError, TimeoutError after `timeout_s`, EOFError or OSError when the worker died over
        the clip, and DiedIdleError when it had not begun it. After the last four only `close` may be called.
        """
        deadline = time.monotonic() + timeout_s
        self._connection.settimeout(timeout_s)
        try:
            self._connection.send(pickle.dumps(request))
            message, files = self._receive(deadline)
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise DiedIdleError(f"{error} ({self.close()})") from None
        assert isinstance(message, Begun) and not files, message
        message, files = self._receive(deadline)
        try:
            if isinstance(message, SampleError | ReaderError):
                raise message
            assert isinstance(message, Answer) and len(files) == 2, message
            rgb_FHW3 = map_tensor(files[0], message.shape_FHW3, torch.uint8)
            times_s = map_tensor(files[1], message.shape_FHW3[:1], torch.float64)
        finally:
            self.num_answers += 1
            for file in files:
                os.close(file)
        return Frames(rgb_FHW3, times_s, message.sampled_fps, message.duration_s, message.reader), message.read_s

    def kill(self) -> None:
        """End the process now, whatever it does. May be called by any thread; the one in `ask` gets EOFError."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    def close(self) -> str:
        """Kill it and free what it holds; returns how it ended, in words."""
        if self._process.poll() is None:
            self.kill()
        code = self._process.wait()
        self._connection.close()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _receive(self, deadline: float) -> tuple[object, list[int]]:
        """The next message and the files that came with it. Raises TimeoutError, EOFError, OSError."""
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        raw, files, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            raise EOFError("the process ended")
        return pickle.loads(raw), list(files)


class WorkerSlot:
    """A place for one `ReaderProcess` after the other: replaced when it hangs, dies or has read its share of clips.

    One thread reads; `close`, `pid` and the counts are for any thread.
    """

    def __init__(self, settings: WorkerSettings, reader_name: str | None) -> None:
        """`reader_name`: what every process must have; None: what the first one says, see `reader_name`."""
        self._settings, self._reader_name = settings, reader_name
        self._process: ReaderProcess | None = None
        self._closing = threading.Event()
        self._num_idle_deaths = 0  # in a row
        self._lock = threading.Lock()
        self.num_timeouts = self.num_crashes = self.num_replaced = 0

    @property
    def _is_closed(self) -> bool:
        return self._closing.is_set()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    @property
    def reader_name(self) -> str:
        """Of the processes; before the first one is ready, the setting."""
        return self._reader_name or self._settings.config.reader

    def make_ready(self) -> ReaderProcess:
        """A process that waits for a request. Raises RuntimeError when none can be had, or after `close`."""
        if self._process is not None and self._process.num_answers >= self._settings.config.clips_per_worker:
            self._end_process()
        while self._process is None:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the loader of videos was closed")
                self._process = ReaderProcess(self._settings)
            try:
                self._process.wait_until_ready(self._reader_name)
                self._reader_name = self._process.reader_name
            except DiedIdleError as error:
                self._pause_after(error)
        return self._process

    def _pause_after(self, error: DiedIdleError) -> None:
        """Another process may take the place of one that died; raises RuntimeError after too many in a row."""
        self.num_crashes += not self._is_closed
        self._end_process()
        self._num_idle_deaths += 1
        if self._num_idle_deaths > len(START_PAUSES_S):
            raise _not_started(self._settings, self._reader_name, f"{self._num_idle_deaths} times in a row: {error}")
        self._closing.wait(START_PAUSES_S[self._num_idle_deaths - 1])

    def read(self, request: ClipRequest) -> tuple[Frames, float]:
        """The clip, and the seconds that took. A worker that dies over it gets one successor for the same clip.

        Raises SampleError for a file that cannot be used, RuntimeError when no worker starts, or after `close`, and of
        these ReaderError when the reader says so.
        """
        timeout_s, ending = self._settings.config.timeout_s, ""
        num_tries = 0
        while num_tries < 2:
            process = self.make_ready()
            try:
                frames, read_s = process.ask(request, timeout_s)
                self._num_idle_deaths = 0
                return frames, read_s
            except DiedIdleError as error:
                self._pause_after(error)
            except TimeoutError as error:
                self.num_timeouts += 1
                self._end_process()
                raise SampleError(
                    request.path, f"{self.reader_name} did not finish within {timeout_s:g} s (video.timeout_s)"
                ) from error
            except (EOFError, OSError):
                num_tries += 1
                self.num_crashes += not self._is_closed
                ending = self._end_process()
        raise SampleError(request.path, f"{self.reader_name} crashed on it twice ({ending}); is the file damaged?")

    def close(self) -> None:
        """End the process at once, also in the middle of a clip."""
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """`close`, and free what is held. For the thread that reads, when it reads no more."""
        self.close()
        if self._process is not None:
            self._end_process()

    def _end_process(self) -> str:
        assert self._process is not None
        self.num_replaced += not self._is_closed
        with self._lock:
            process, self._process = self._process, None
        return process.close()


def _not_started(settings: WorkerSettings, reader_name: str | None, problem: str) -> RuntimeError:
    advice = "try video.num_workers=0, which shows the whole error"
    if settings.gpu_index is not None:  # never in this process
        advice = "set video.reader to pyav, or see `vcr1-fast doctor`"
    reader = reader_name or settings.config.reader
    return RuntimeError(f"the worker that reads videos with {reader} did not start: {problem}; {advice}")
