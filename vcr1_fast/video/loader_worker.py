"""The process that reads clips for `FrameLoader`: `python -m vcr1_fast.video.loader_worker FD PARENT`.

FD is a socket that keeps messages apart (SOCK_SEQPACKET), PARENT the process that started this one. It receives one
pickled `WorkerSettings` and answers `Ready`; then one pickled `ClipRequest` at a time, answered by `Begun` and then by
`Answer`, by a `SampleError` or by a `ReaderError`. Frames travel in shared memory whose descriptor comes with the
message. Started by `reader_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vcr1_fast.types import Frames, SampleError

if TYPE_CHECKING:
    from vcr1_fast.settings.config import VideoConfig
    from vcr1_fast.video.clip import ClipRequest
    from vcr1_fast.video.reader import Reader

MAX_MESSAGE_BYTES = 1 << 16  # a path has 4 KB at most; times and frames go through shared memory
MAX_REASON_LETTERS = 1000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker must know before its first clip."""

    open_reader: Callable[[VideoConfig], Reader]  # pickled by its name, so a function of a module
    config: VideoConfig
    gpu_index: int | None = None  # the GPU that it decodes on, if it does; a new process would take the first one


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker waits for requests."""

    reader_name: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The file is about to be opened: what ends the worker from now on may be its fault."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`Frames` without the tensors: rgb_FHW3 and times_s are in the two files that come with it."""

    shape_FHW3: tuple[int, int, int, int]
    sampled_fps: float
    duration_s: float
    reader: str
    read_s: float  # how long the worker needed, seconds


def decode(request: ClipRequest, reader: Reader) -> Frames:
    """`read_clip`, with everything a decoder may raise on a damaged file turned into a SampleError.

    Raises ReaderError, too.
    """
    from vcr1_fast.video.clip import read_clip
    from vcr1_fast.video.reader import ReaderError

    try:
        return read_clip(request, reader)
    except (SampleError, ReaderError):
        raise
    except Exception as error:  # a library's bug on a damaged file must not end a run of days
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON_LETTERS]
        raise SampleError(request.path, f"{reader.name} failed on it ({cause}); is the file damaged?") from error


def serve(connection: socket.socket) -> None:
    """Answer requests until the other end is closed."""
    settings: WorkerSettings = pickle.loads(connection.recv(MAX_MESSAGE_BYTES))
    try:
        import torch

        import vcr1_fast.video.clip  # noqa: F401  (slow to import: before the first clip's time-out starts to run)

        torch.set_num_threads(1)
        if settings.gpu_index is not None:
            torch.cuda.set_device(settings.gpu_index)
        reader = settings.open_reader(settings.config)
    except Exception as error:
        connection.send(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"[:MAX_REASON_LETTERS])))
        return
    gc.freeze()
    connection.send(pickle.dumps(Ready(reader.name)))
    while raw := connection.recv(MAX_MESSAGE_BYTES):
        request: ClipRequest = pickle.loads(raw)
        connection.send(pickle.dumps(Begun()))
        with give_up_after(settings.config.timeout_s + 10.0):
            _answer(connection, request, reader)
        # PyAV's containers are cycles that hold their decoders' frames: 200 clips of 4 small frames left 39 MB behind,
        # 600 of them 4 MB with this. Cheap, because everything older is frozen.
        gc.collect()


def _answer(connection: socket.socket, request: ClipRequest, reader: Reader) -> None:
    from vcr1_fast.video.reader import ReaderError
    from vcr1_fast.video.shared_memory import write_tensor

    started = time.monotonic()
    try:
        frames = decode(request, reader)
        read_s = time.monotonic() - started
    except SampleError as error:
        connection.send(pickle.dumps(SampleError(error.source, error.reason[:MAX_REASON_LETTERS])))
        return
    except ReaderError as error:
        connection.send(pickle.dumps(ReaderError(str(error)[:MAX_REASON_LETTERS])))
        return
    f, h, w, c = frames.rgb_FHW3.shape
    answer = Answer((f, h, w, c), frames.sampled_fps, frames.duration_s, frames.reader, read_s)
    files = [write_tensor(frames.rgb_FHW3), write_tensor(frames.times_s)]
    socket.send_fds(connection, [pickle.dumps(answer)], files)
    for file in files:
        os.close(file)


@contextlib.contextmanager
def give_up_after(limit_s: float) -> Iterator[None]:
    """End this process if the block takes longer: the parent kills it before, unless the parent is dead.

    The default action of SIGALRM needs neither the GIL nor a C library that returns.
    """
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_with(parent: int) -> None:
    """Have the kernel end this process when `parent` ends, and when memory runs out before it ends `parent`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def main() -> None:
    end_with(int(sys.argv[2]))
    # FFmpeg and decord may read from 0 and print to 1; the parent gives /dev/null for them.
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    from vcr1_fast.video import loader_worker

    loader_worker.main()  # by its name: messages are pickled with the name of their module, "__main__" is no one's
