"""The process around one SGLang engine: started, asked, watched and killed from the trainer's side."""

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
from vcr1_fast.rollout.sglang_messages import KEY_VARIABLE, Channel, Listener, Message

WORKER_MODULE = "vcr1_fast.rollout.sglang_worker"
STOP_WAIT_S = 15.0
LOG_TAIL_LINES = 15
# Of the trainer's environment: what would make SGLang join the trainer's process group, run its kernels in Triton's
# interpreter, or share memory in a form that CUDA IPC does not know.
_NOT_INHERITED = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
}
_PREPROCESSOR = {  # of Qwen2.5-VL; SGLang opens the checkpoint's processor although no picture goes through it
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


class WorkerGoneError(Exception):
    """The worker's process ended or does not answer. The engine starts another one."""


class WorkerProcess:
    """One worker, over all its restarts. `start` begins a process, `wait_ready` waits until its engine is up."""

    def __init__(self, python: str, engine_args: Mapping[str, Any], folder: Path, name: str = "worker") -> None:
        """`python`: interpreter that has SGLang; `folder`: private, for socket and log."""
        self.limits: Mapping[str, int] = {}
        self.version = ""
        self.num_starts = 0
        self.log = folder / f"{name}.log"
        self._python = python
        self._engine_args = dict(engine_args)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: Listener | None = None
        self._channel: Channel | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def channel(self) -> Channel:
        if self._channel is None:
            raise WorkerGoneError("is not running")
        return self._channel

    @property
    def is_ready(self) -> bool:
        return self._channel is not None

    def start(self) -> None:
        """Begin a process and return. Raises OSError when the interpreter cannot be run."""
        self.kill()
        self._listener = Listener(self._folder)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        # Our package alone, through a link: its folder may hold all packages of the trainer, in the trainer's versions.
        environment |= {"PYTHONPATH": str(self._package_folder()), KEY_VARIABLE: self._listener.key.hex()}
        self.num_starts += 1
        with self.log.open("ab") as log:
            # An own session: Ctrl-C ends the run in order, and the process group can be killed as a whole.
            self._process = subprocess.Popen(
                [self._python, "-m", WORKER_MODULE, self._listener.address],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float) -> None:
        """Raises WorkerGoneError, with the end of its log, when the engine does not come up in time."""
        assert self._process is not None and self._listener is not None, "start it first"
        deadline = time.monotonic() + timeout_s
        channel = None
        while channel is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._gone(f"did not connect within {timeout_s:g} s")
            channel = self._listener.accept(0.5)
        self._listener.close()
        self._channel = channel
        try:
            channel.send("start", {"engine_args": self._engine_args}, timeout_s=timeout_s)
            ready = channel.receive(max(1.0, deadline - time.monotonic()))
        except (OSError, EOFError, ValueError) as error:
            raise self._gone(f"did not get ready within {timeout_s:g} s ({error})") from error
        if ready.kind != "ready":
            raise self._gone(f"cannot run: {ready.fields.get('reason', ready.kind)}")
        self.limits, self.version = ready.fields["limits"], ready.fields["version"]

    def ask(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], timeout_s: float) -> Message:
        """Send and wait for the answer, while nothing else is under way. Raises WorkerGoneError; it is then killed."""
        try:
            self.channel.send(kind, fields, tensors, timeout_s=timeout_s)
            while True:
                answer = self.channel.receive(timeout_s)
                if answer.fields.get("id") == fields["id"]:  # others answer requests that were given up
                    return answer
        except (OSError, EOFError, ValueError) as error:
            raise self._gone(f"gave no answer to {kind!r} ({type(error).__name__}: {error})") from error

    def kill(self) -> None:
        """End the process and those that it started, now."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not."""
        if self._channel is not None and self._process is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._channel.send("close", timeout_s=1.0)
                self._process.wait(STOP_WAIT_S)
        self.kill()

    def _gone(self, what: str) -> WorkerGoneError:
        code = None if self._process is None else self._process.poll()
        self.kill()
        try:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
        except OSError:
            tail = "(no log)"
        ended = f"; its process ended with {code}" if code is not None else ""
        return WorkerGoneError(f"{what}{ended}. The end of its log {self.log}:\n{tail}")

    def _package_folder(self) -> Path:
        folder = self._folder / "package"
        if not folder.exists():
            folder.mkdir()
            (folder / "vcr1_fast").symlink_to(Path(vcr1_fast.__file__).resolve().parent)
        return folder


def prepare_model_folder(checkpoint: Path, folder: Path) -> Path:
    """A folder of links to the checkpoint's files but its weights, which come by message, with processor settings.

    Without links to the weights SGLang cannot read stale ones: it starts with random numbers (load_format dummy), and
    the comparison after the first load shows if any of them is left.
    """
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and ".safetensors" not in path.name and path.suffix not in (".bin", ".pth", ".py", ".yaml"):
            (folder / path.name).symlink_to(path.resolve())
    if not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    return folder
