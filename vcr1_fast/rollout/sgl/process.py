"""The process around one SGLang engine: started, watched and killed by the trainer, or by `vcr1-fast serve`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vcr1_fast
from vcr1_fast.rollout.sgl.link import WorkerGoneError as WorkerGoneError
from vcr1_fast.rollout.sgl.link import WorkerLink
from vcr1_fast.rollout.sgl.messages import KEY_VARIABLE, Channel, Listener
from vcr1_fast.run.model_folder import settings_files
from vcr1_fast.run.stop_signals import kept_from_children

WORKER_MODULE = "vcr1_fast.rollout.sgl.worker"
STOP_WAIT_S = 15.0
LOG_TAIL_LINES = 15
# Of the trainer's environment: what would make SGLang join the trainer's process group, run its kernels in Triton's
# interpreter, or share memory in a form that CUDA IPC does not know; and a secret that it does not need.
_NOT_INHERITED = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "VCR1_ROLLOUT_KEY"),
}
_PREPROCESSOR = {  # of Qwen2.5-VL; SGLang opens the checkpoint's processor although no picture goes through it
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


class Child:
    """A process of worker.py, over all its restarts, and the Unix socket to it."""

    def __init__(self, python: str, folder: Path, log: Path) -> None:
        """`python`: interpreter that has SGLang; `folder`: private, for the socket; `log`: what it prints, appended."""
        self.log = log
        self._python = python
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: Listener | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before a start."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Begin a process and return. Raises OSError when the interpreter cannot be run."""
        self.kill()
        self._listener = Listener(self._folder)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        # Our package alone, through a link: its folder may hold all packages of the trainer, in the trainer's versions.
        environment |= {"PYTHONPATH": str(self._package_folder()), KEY_VARIABLE: self._listener.key.hex()}
        with self.log.open("ab") as log, kept_from_children():
            # An own session: Ctrl-C ends the run in order, and the process group can be killed as a whole.
            self._process = subprocess.Popen(
                [self._python, "-m", WORKER_MODULE, self._listener.address],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def accept(self, timeout_s: float) -> Channel | None:
        """The channel to it, once it has connected; None when it has not by then, or has ended."""
        assert self._listener is not None, "start it first"
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None and time.monotonic() < deadline:
            channel = self._listener.accept(min(0.5, timeout_s))
            if channel is not None:
                self._listener.close()
                return channel
        return None

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self) -> None:
        """End the process and those that it started, now."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """Of its process that ended, if it did, and of its log."""
        code = self.exit_code
        try:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
        except OSError:
            tail = "(no log)"
        ended = f"; its process ended with {code}" if code is not None else ""
        return f"{ended}. The end of its log {self.log}:\n{tail}"

    def _package_folder(self) -> Path:
        folder = self._folder / "package"
        if not folder.exists():
            folder.mkdir()
            (folder / "vcr1_fast").symlink_to(Path(vcr1_fast.__file__).resolve().parent)
        return folder


class WorkerProcess(WorkerLink):
    """A worker that is a child of this process."""

    def __init__(self, python: str, engine_args: Mapping[str, Any], folder: Path, name: str = "worker") -> None:
        """`python`: interpreter that has SGLang; `folder`: private, for socket and log."""
        super().__init__(name)
        self._child = Child(python, folder, folder / f"{name}.log")
        self._engine_args = engine_args

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self) -> None:
        self.kill()
        self.num_starts += 1
        self._child.start()

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        channel = self._child.accept(timeout_s)
        if channel is None:
            raise self._gone(f"did not connect within {timeout_s:g} s")
        self._begin_engine(channel, self._engine_args, max(1.0, deadline - time.monotonic()))

    def kill(self) -> None:
        self._drop_channel()
        self._child.kill()

    def stop(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send("close", timeout_s=1.0)
                self._child.wait(STOP_WAIT_S)
        self.kill()

    def _gone(self, what: str) -> WorkerGoneError:
        words = self._child.last_words()
        self.kill()
        return WorkerGoneError(what + words)


def prepare_model_folder(checkpoint: Path, folder: Path) -> Path:
    """A folder of links to the checkpoint's settings files, with processor settings; its weights come by message.

    Without links to the weights SGLang cannot read stale ones: it starts with random numbers (load_format dummy), and
    the comparison after the first load shows if any of them is left.
    """
    folder.mkdir()
    for path in settings_files(checkpoint):
        (folder / path.name).symlink_to(path.resolve())
    if not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    return folder
