"""Saves the checkpoints of a run, by default beside the steps that follow.

    with CheckpointSaver(output_dir, (policy, optimizer, schedule), config.checkpoint, world) as saver:
        for step in ...:
            ...
            saver.poll()
            if (a checkpoint is due):
                saver.save(state)

`save` copies what is to be written into host memory that a process of its own writes out (staging.py,
checkpoint_writer.py), and returns; the weights may then change. `poll` gives the checkpoint its name once it is whole,
which only the run itself does: a writer that outlived it could not. One is written at a time. `save`, `poll` and the
ends of the block are collectives. Called by the loops of train.py and sft.py.

Why not torch's `async_save` with a process: it needs a process group, which one process has not; the writer it starts
lives on after a run that is killed; and see staging.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vcr1_fast.learner.sharding import World, all_max_int, barrier, on_all_ranks, on_main_rank
from vcr1_fast.run.best_checkpoint import BestCheckpoint
from vcr1_fast.run.checkpoint import RunState, Unwritten, begin_checkpoint, prune, removed_on_error, save_checkpoint
from vcr1_fast.run.checkpoint_layout import ShardPlan, local_part
from vcr1_fast.run.folder import replace_folder
from vcr1_fast.run.staging import USABLE_FRAC, Staging, free_host_bytes
from vcr1_fast.run.stop_signals import StoppedBySignal, kept_from_children
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import CheckpointConfig, ConfigError

Parts = tuple[nn.Module, Optimizer, LambdaLR]
_LOG = logging.getLogger(__name__)
_WAIT_S = 0.2  # between two looks of all ranks at each other's writers
_OTHER_RANKS_S = 60.0  # a run that ends with an error waits so long for files of ranks that may be dead
_DONE, _WRITING, _FAILED = range(3)


class CheckpointSaver:
    """See the module's docstring."""

    def __init__(self, output_dir: Path, parts: Parts, config: CheckpointConfig, world: World) -> None:
        self._output_dir, self._parts, self._config, self._world = output_dir, parts, config, world
        self._best = BestCheckpoint(output_dir, config.keep_best, config.keep_best_mode)
        self._plan = ShardPlan()
        self._writer: _Writer | None = None
        self._pending: Unwritten | None = None
        self._has_waited = False
        self._write_s = 0.0  # of the checkpoint that was named last, until it is logged

    def __enter__(self) -> Self:
        """Raises ConfigError where checkpoint.asynchronous is true and the copies do not fit into this machine."""
        needed, free = _staged_bytes(self._parts[0], self._world), free_host_bytes()
        lacks = all_max_int(needed > USABLE_FRAC * free, self._world) > 0
        fit = f"{needed / 1e9:.1f} GB of host memory a machine, of which {free / 1e9:.1f} GB are free"
        if lacks and self._config.asynchronous:
            raise ConfigError(f"checkpoint.asynchronous is true, which takes {fit}, on some machine too few: set false")
        if lacks or self._config.asynchronous is False:
            why = f"written beside them they would take {fit}" if lacks else "as checkpoint.asynchronous says"
            say(f"checkpoints: written between steps ({why})")
        else:
            say(f"checkpoints: written beside the steps, from {fit}")
            self._writer = _Writer(self._world)
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, StoppedBySignal):
                self.poll(wait=True)
            elif issubclass(kind, Exception):
                self._finish_alone()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def save(self, state: RunState) -> None:
        """Write a checkpoint of everything the run needs to go on bit for bit.

        Raises as `save_checkpoint` does, also for the checkpoint before, which is finished first.
        """
        self.poll()
        if self._pending is not None and not self._has_waited:
            name = self._pending.final.name
            say(f"the run waits for {name} to be written: checkpoints are due faster than the disk takes them")
            self._has_waited = True
        self.poll(wait=True)
        if self._writer is None:
            folder = save_checkpoint(self._output_dir, *self._parts, state, self._world, keep=sys.maxsize)
            on_main_rank("keeping the best checkpoint", lambda: self._keep(folder), self._world)
            say(f"checkpoint: {folder}")
            return
        writer = self._writer
        made = begin_checkpoint(self._output_dir, *self._parts, state, self._world, self._plan)
        with removed_on_error(made.aside, self._world):
            on_all_ranks("copying the checkpoint to host memory", lambda: writer.begin(made), self._world)
        self._pending = replace(made, files=())  # which hold the tensors

    def poll(self, *, wait: bool = False) -> None:
        """Give a checkpoint that has been written its name, and delete old ones. `wait`: until it is written.

        Raises OSError, on every rank, when it could not be written; earlier checkpoints are then untouched.
        """
        if self._pending is None or self._writer is None:
            return
        writer, pending = self._writer, self._pending
        while (status := all_max_int(writer.status(_WAIT_S if wait else 0.0), self._world)) == _WRITING:
            if not wait:
                return
        self._pending, self._write_s = None, writer.seconds
        if status == _FAILED:
            writer.close()  # of every rank, before what it writes is removed
            barrier(self._world)
            with removed_on_error(pending.aside, self._world):
                on_all_ranks("writing the checkpoint", lambda: writer.require_written(pending), self._world)
        on_main_rank("publishing the checkpoint", lambda: self._name(pending), self._world)
        say(f"checkpoint: {pending.final}")

    def noted(self, step: int, scores: Mapping[str, float]) -> Mapping[str, float]:
        """The held-out scores after a step, by their names below eval/, once checkpoint.keep_best has seen them. Not a
        collective, but alike on all ranks. Raises ConfigError when the metric that it names is not among them."""
        self._best.note(step, scores)
        if self._world.is_main and self._pending is None:  # else a folder of that step is an older one
            self._settle()
        return scores

    def metrics(self) -> dict[str, float]:
        """Seconds of the writer, in the step after a checkpoint got its name."""
        seconds, self._write_s = self._write_s, 0.0
        return {"checkpoint/write_s": seconds} if seconds else {}

    def _name(self, pending: Unwritten) -> None:
        with removed_on_error(pending.aside, self._world):
            replace_folder(pending.aside, pending.final)
        self._keep(pending.final)

    def _keep(self, folder: Path) -> None:
        self._best.forget(folder.name)  # one of that step is another one now
        self._settle()

    def _settle(self) -> None:
        self._best.settle()
        prune(self._output_dir.absolute(), self._config.keep, self._best.name)

    def _finish_alone(self) -> None:
        """After an error, of this rank alone perhaps, there are no collectives any more. What the writers complete and
        nobody names gets its name at the next start."""
        if self._writer is None or self._pending is None:
            return
        waits_for_others = self._world.is_main and self._world.world_size > 1
        until_s = time.monotonic() + (_OTHER_RANKS_S if waits_for_others else math.inf)
        while self._writer.status(_WAIT_S) == _WRITING and time.monotonic() < until_s:
            pass
        if self._world.is_main and self._writer.status(0.0) == _DONE:
            try:
                self._name(self._pending)
            except OSError as error:  # the error that ends the run is the one to be told
                _LOG.warning("cannot give checkpoint %s its name: %s", self._pending.final, error)


def _staged_bytes(policy: nn.Module, world: World) -> int:
    """Of all ranks on this machine: what is trained and its two moments."""
    trained = [local_part(weight) for weight in policy.parameters() if weight.requires_grad]
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return 3 * num_ranks * sum(weight.numel() * weight.element_size() for weight in trained)


@dataclass
class _Answer:
    status: int
    error: str = ""


class _Writer:
    """The process that writes this rank's files, and the memory it reads them from."""

    def __init__(self, world: World) -> None:
        self._world, self._staging = world, Staging(world.device)
        self._connection, child = socket.socketpair()
        descriptors = (child.fileno(), self._staging.descriptor)
        command = (sys.executable, "-m", "vcr1_fast.run.checkpoint_writer", *map(str, (*descriptors, os.getpid())))
        with child, kept_from_children():
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is the run's
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._answer = _Answer(_DONE)
        self.seconds = 0.0  # that the last job took

    def begin(self, made: Unwritten) -> None:
        """Copy, and have it written. Raises OSError."""
        places = self._staging.stage(made.files)
        job: dict[str, Any] = {"folder": str(made.aside), "files": places, "document": dict(made.document)}
        job |= {"rank": self._world.rank, "world_size": self._world.world_size}
        self._answer = _Answer(_WRITING)
        try:
            self._connection.sendall(json.dumps(job).encode() + b"\n")
        except OSError:
            self._answer = self._death()
            self.require_written(made)

    def status(self, wait_s: float) -> int:
        """Of the last job, after `wait_s` at most."""
        if self._answer.status == _WRITING and select.select([self._connection], [], [], wait_s)[0]:
            line = b""
            with contextlib.suppress(ConnectionResetError):  # it died before it had read its job
                line = self._connection.makefile("rb").readline()
            if line.endswith(b"\n"):
                answer = json.loads(line)
                self._answer = _Answer(_FAILED, answer["error"]) if "error" in answer else _Answer(_DONE)
                self.seconds = answer.get("seconds", 0.0)
            else:
                self._answer = self._death()
        return self._answer.status

    def _death(self) -> _Answer:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return _Answer(_FAILED, f"the process that writes it, {self.process.pid}, ended with {how}")

    def require_written(self, made: Unwritten) -> None:
        """Raises OSError when the last job failed."""
        if self._answer.status == _FAILED:
            raise OSError(
                f"cannot write checkpoint {made.final}: {self._answer.error}; those before it stay: with that mended "
                "start the same command again"
            )

    def close(self) -> None:
        """End the process, also in the middle of a job."""
        self._connection.close()
        self.process.kill()
        self.process.wait()
        self._staging.close()
