"""What the trainer has of one rollout worker, a child or on another machine: a connection, over all its restarts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from vcr1_fast.rollout.sgl.channel import VERSION, Channel, KeyRefusedError, connect
from vcr1_fast.rollout.sgl.group import Libraries
from vcr1_fast.rollout.sgl.messages import Message, SharedBytes
from vcr1_fast.rollout.sgl.process import STOP_WAIT_S, Child

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between two tries to connect
MAX_REFUSALS = 4  # in a row, within a second: a worker that ends in its handshake refuses once


class WorkerGoneError(Exception):
    """The worker ended or does not answer. The engine starts another one."""


class WorkerLink:
    """`start` begins a worker's process, `wait_ready` has its engine started.

    Without a child, `kill` and `stop` disconnect: the worker then ends, and `vcr1-fast serve` starts a fresh one.
    """

    def __init__(
        self, name: str, address: str, key: bytes, engine_args: Mapping[str, Any], child: Child | None = None
    ) -> None:
        """`name`: for messages to people; `address`: see channel.py; `child`: that has this address and key."""
        self.name, self.child = name, child
        self.limits: Mapping[str, int] = {}  # what requests are checked against, see video.check_request
        self.version = ""  # of SGLang
        self.libraries = Libraries("", "", "")
        self._address, self._key, self._engine_args = address, key, dict(engine_args)
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        """Raises WorkerGoneError when there is none."""
        if self._channel is None:
            raise WorkerGoneError("is not running")
        return self._channel

    @property
    def is_ready(self) -> bool:
        return self._channel is not None

    @property
    def has_ended(self) -> bool:
        """Whether it is known to be gone, by the end of its connection; one that hangs is not."""
        return self._channel is None or self._channel.is_over

    def start(self) -> None:
        """Begin, and return at once; ends what was there before. Raises OSError when that cannot work at all."""
        self.kill()
        if self.child:
            torch.cuda.empty_cache()  # of what the learner has cached the engine needs a part; nothing without a GPU
            self.child.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Tries until there is an engine, or none can be. Raises WorkerGoneError, with the end of its log if it has
        one."""
        deadline, pause_s, num_refusals, told = time.monotonic() + timeout_s, FIRST_PAUSE_S, 0, ""
        while num_refusals < MAX_REFUSALS:
            if self.child and self.child.exit_code is not None:
                raise self.gone("ended in its start")
            if told and time.monotonic() >= deadline:
                raise self.gone(f"did not get ready within {timeout_s:g} s: {told}")
            try:
                return self._begin(deadline)
            except KeyRefusedError as error:
                num_refusals, told = num_refusals + 1, f"cannot be reached: {error}"
            except ValueError as error:
                raise self.gone(f"cannot run: {error}") from error
            except (OSError, EOFError) as error:
                is_absent = isinstance(error, ConnectionRefusedError) and not self.child
                hint = "; is `vcr1-fast serve` running there?" if is_absent else ""
                num_refusals, told = 0, f"{error}{hint}"
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise self.gone(told)

    def kill(self) -> None:
        """End it now, or disconnect."""
        if self._channel:
            self._channel.close()
            self._channel = None
        if self.child:
            self.child.kill()

    def stop(self) -> None:
        """End it in order if it listens; the last resort is `kill`."""
        if self._channel:
            with contextlib.suppress(OSError):
                self._channel.send("close")
                if self.child:
                    self.child.wait(STOP_WAIT_S)
            self._channel.close(linger_s=1.0)
        self.kill()

    def send(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Of shared memory, a bucket of weights, only what its entries name is sent to another machine. Raises
        WorkerGoneError or OSError when the worker is gone."""
        if not self.child:
            stop = max((int(entry["stop"]) for entry in fields.get("entries", ())), default=None)
            tensors = {n: v.bytes_B[:stop] if isinstance(v, SharedBytes) else v for n, v in tensors.items()}
        self.channel.send(kind, fields, tensors)

    def answer(self, timeout_s: float) -> Message:
        """What it says next. Raises as `Channel.receive`, and WorkerGoneError."""
        return self.channel.receive(timeout_s)

    def gone(self, what: str) -> WorkerGoneError:
        """Ends the worker; the error to raise, with what is known of its end."""
        far = f". It runs at {self.name}: `vcr1-fast serve` has its log there"
        where = self.child.last_words() if self.child else far
        self.kill()
        return WorkerGoneError(what + where)

    def _begin(self, deadline: float) -> None:
        """Raises KeyRefusedError, ValueError when it will never take this trainer, or has no engine for it, and OSError
        or EOFError when another try may help."""
        channel = connect(self._address, self._key)
        try:
            channel.send("start", {"version": VERSION, "engine_args": self._engine_args})
            answer = _ready(channel, deadline)
        except BaseException:
            channel.close()
            raise
        self._channel, self.limits = channel, answer.fields["limits"]
        self.version, self.libraries = answer.fields["version"], Libraries(**answer.fields["libraries"])


def _ready(channel: Channel, deadline: float) -> Message:
    told = "it does not answer"
    while True:
        try:
            answer = channel.receive(deadline - time.monotonic())
        except TimeoutError:
            raise TimeoutError(told) from None
        if answer.kind == "ready":
            return answer
        if answer.kind != "starting":
            reason = str(answer.fields.get("reason", answer.kind))
            raise ConnectionError(reason) if answer.kind == "busy" else ValueError(reason)
        told = "its engine has not started yet"
