"""The process around one SGLang engine: started, watched and killed by the trainer, or by `vcr1-fast serve`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vcr1_fast
from vcr1_fast.rollout.sgl.endpoint import KEY_VARIABLE, STATUS_VARIABLE
from vcr1_fast.run.model_folder import settings_files
from vcr1_fast.run.stop_signals import kept_from_children

WORKER_MODULE = "vcr1_fast.rollout.sgl.worker"
STOP_WAIT_S = 15.0
LOG_TAIL_LINES = 15
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
    """A process of worker.py, over all its restarts."""

    def __init__(
        self, python: str, folder: Path, log: Path, address: str, key: bytes, own_args: Mapping[str, Any] | None = None
    ) -> None:
        """`python`: interpreter that has SGLang; `folder`: private; `log`: what it prints, appended; `address`, `key`:
        where it is reached, and by whom; `own_args`: arguments of its engine that go before a trainer's."""
        self.log, self.address, self.key = log, address, key
        self._python, self._folder = python, folder
        self._own_args, self._status = json.dumps(dict(own_args or {})), folder / f"{log.stem}.status"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begins = 0  # of the process that runs

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before a start."""
        process = self._process  # another thread may end it
        return None if process is None else process.poll()

    def start(self) -> None:
        """Begin a process and return. Raises OSError when the interpreter cannot be run."""
        self.kill()
        environment = child_environment(self._python)
        # Our package alone, through a link: its folder may hold all packages of the trainer, in the trainer's versions.
        environment |= {"PYTHONPATH": str(self._package_folder())}
        environment |= {KEY_VARIABLE: self.key.hex(), STATUS_VARIABLE: str(self._status)}
        self._status.unlink(missing_ok=True)
        with self.log.open("ab") as log, kept_from_children():
            self._log_begins = log.tell()
            # An own session: Ctrl-C ends the run in order, and the process group can be killed as a whole.
            self._process = subprocess.Popen(
                [self._python, "-m", WORKER_MODULE, self.address, self._own_args],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> None:
        """Until it has ended, so long at most."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)

    def status(self) -> tuple[dict[str, str], float]:
        """What it says of itself, empty before it waits for a trainer, and for how many seconds it has not moved."""
        try:
            return json.loads(self._status.read_text(encoding="utf-8")), time.time() - self._status.stat().st_mtime
        except FileNotFoundError:
            return {}, 0.0

    def ask_to_end(self) -> None:
        """In order, so that SGLang gives its shared memory back; one that has said what it is does so soon."""
        self._status.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the process and those that it started, now."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

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
