"""The process around one SGLang engine: started, watched and killed by the trainer, or by `vcr1-fast serve`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vcr1_fast
from vcr1_fast.rollout.sgl.link import WorkerGoneError as WorkerGoneError
from vcr1_fast.rollout.sgl.link import WorkerLink
from vcr1_fast.rollout.sgl.messages import KEY_VARIABLE, Channel, Listener
from vcr1_fast.run.model_folder import settings_files
from vcr1_fast.run.stop_signals import kept_from_children

WORKER_MODULE = "vcr1_fast.rollout.sgl.worker"
STOP_WAIT_S = 15.0
LOG_TAIL_LINES = 15
PORT_TAKEN = re.compile("EADDRINUSE|Address already in use", re.IGNORECASE)  # torch's words, and the C library's
# Of the trainer's environment: what would make SGLang join the trainer's process group or wait at torchrun's store, run
# its kernels in Triton's interpreter, or share memory in a form that CUDA IPC does not know; and a secret that it does
# not need. torchrun's are in torch/distributed/elastic/agent/server/local_elastic_agent.py.
_NOT_INHERITED = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "VCR1_ROLLOUT_KEY"),
}
_NOT_INHERITED_BEGIN = ("TORCHELASTIC_", "GROUP_", "ROLE_")
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
        self._log_begins = 0  # of the process that runs

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
        environment = child_environment(self._python)
        # Our package alone, through a link: its folder may hold all packages of the trainer, in the trainer's versions.
        environment |= {"PYTHONPATH": str(self._package_folder()), KEY_VARIABLE: self._listener.key.hex()}
        with self.log.open("ab") as log, kept_from_children():
            self._log_begins = log.tell()
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
        tail = "\n".join(self.printed().splitlines()[-LOG_TAIL_LINES:])
        ended = f"; its process ended with {code}" if code is not None else ""
        return f"{ended}. The end of its log {self.log}:\n{tail}"

    def printed(self) -> str:
        """By the process that was started last."""
        try:
            return self.log.read_bytes()[self._log_begins :].decode(errors="replace")
        except OSError:
            return "(no log)"

    def _package_folder(self) -> Path:
        folder = self._folder / "package"
        if not folder.exists():
            folder.mkdir()
            (folder / "vcr1_fast").symlink_to(Path(vcr1_fast.__file__).resolve().parent)
        return folder


def child_environment(python: str) -> dict[str, str]:
    """This process's environment as a process of the interpreter `python` may have it: see _NOT_INHERITED. The programs
    of its environment come first: SGLang calls `ninja` by name when it compiles kernels."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_BEGIN)
    }
    programs = os.path.abspath(os.path.dirname(shutil.which(python) or python))  # an environment's python is a link
    return environment | {"PATH": os.pathsep.join([programs, environment.get("PATH", os.defpath)])}


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
        torch.cuda.empty_cache()  # of what the learner has cached the engine needs a part; nothing without a GPU
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
        is_port_taken = bool(PORT_TAKEN.search(self._child.printed()))
        self.kill()
        return WorkerGoneError(what + words, is_port_taken=is_port_taken)


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
