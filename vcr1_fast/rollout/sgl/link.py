"""What the trainer has of one rollout worker, a child or on another machine: a connection, questions and answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.channel import VERSION, Channel, KeyRefusedError, connect
from vcr1_fast.rollout.sgl.group import Libraries
from vcr1_fast.rollout.sgl.messages import Message, SharedBytes
from vcr1_fast.rollout.sgl.process import STOP_WAIT_S, Child

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between two tries to connect
POLL_S = 0.25
ENDED = "ended in its start"
MAX_REFUSALS = 4  # in a row, within a second: a worker that ends in its handshake refuses once


class WorkerGoneError(Exception):
    """The worker ended or does not answer. The engine starts another one."""


class WorkerLink:
    """One worker, over all its restarts. `start` begins, `wait_ready` waits until its engine is up.

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
        self._starting: _Start | None = None
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
        return self._channel is None or self._channel.is_closed

    def start(self) -> None:
        """Begin, and return at once; ends what was there before. Raises OSError when that cannot work at all."""
        self.kill()
        if self.child:
            torch.cuda.empty_cache()  # of what the learner has cached the engine needs a part; nothing without a GPU
            self.child.start()
        self._starting = _Start(self._address, self._key, self._engine_args, self.child)

    def wait_ready(self, timeout_s: float) -> None:
        """Raises WorkerGoneError, saying why, when the engine does not come up in time."""
        assert self._starting is not None, "start it first"
        try:
            self._channel, ready = self._starting.result(timeout_s)
        except (OSError, EOFError, ValueError, KeyRefusedError) as error:
            raise self._gone(str(error)) from error
        self._starting = None
        self.limits, self.version = ready.fields["limits"], ready.fields["version"]
        self.libraries = Libraries(**ready.fields["libraries"])

    def kill(self) -> None:
        """End it now. Several threads may."""
        (starting, self._starting), (channel, self._channel) = (self._starting, None), (self._channel, None)
        if starting:
            starting.give_up()
        if channel:
            channel.close(linger_s=1.0)
        if self.child:
            self.child.kill()

    def stop(self) -> None:
        """Ask it to end; end it if it does not."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send("close")
                if self.child:
                    self.child.wait(STOP_WAIT_S)
        self.kill()

    def post(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Send a `generate` request. Raises WorkerGoneError or OSError when the worker is gone."""
        self.channel.send("generate", fields, tensors)

    def ask(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], timeout_s: float) -> Message:
        """Send and wait for the answer, while nothing else is under way. Raises WorkerGoneError; it is then killed.
        Of shared memory, a bucket of weights, only what its entries name is sent to another machine."""
        stop = max((int(entry["stop"]) for entry in fields.get("entries", ())), default=None)
        sent = {
            name: value.bytes_B[:stop] if isinstance(value, SharedBytes) and not self.child else value
            for name, value in tensors.items()
        }
        try:
            self.channel.send(kind, fields, sent)
            while True:
                answer = self.channel.receive(timeout_s)
                if answer.fields.get("id") == fields["id"]:  # others answer requests that were given up
                    return answer
        except (OSError, EOFError, ValueError) as error:
            raise self._gone(f"gave no answer to {kind!r} ({type(error).__name__}: {error})") from error

    def _gone(self, what: str) -> WorkerGoneError:
        """Ends the worker; the error to raise, with what is known of its end."""
        far = f". It runs at {self.name}: `vcr1-fast serve` has its log there"
        where = self.child.last_words() if self.child else far
        self.kill()
        return WorkerGoneError(what + where)


class _Start:
    """One start, in a thread of its own, so that many workers start together: elsewhere whole, on the trainer's GPU up
    to their engines, which measure what is free on it."""

    def __init__(self, address: str, key: bytes, engine_args: Mapping[str, Any], child: Child | None) -> None:
        self._address, self._key, self._engine_args, self._child = address, key, engine_args, child
        self._told = "it does not answer"  # what held the start up last
        self._given_up, self._is_awaited = threading.Event(), threading.Event()
        self._done: Future[tuple[Channel, Message]] = Future()
        threading.Thread(target=self._run, daemon=True).start()

    def result(self, timeout_s: float) -> tuple[Channel, Message]:
        """The connection, and the worker's `ready`. Raises KeyRefusedError, ValueError, EOFError, OSError."""
        self._is_awaited.set()
        try:
            return self._done.result(timeout_s)
        except TimeoutError:
            raise TimeoutError(f"did not get ready within {timeout_s:g} s: {self._told}") from None
        except EOFError:
            raise EOFError(ENDED) from None

    def give_up(self) -> None:
        self._given_up.set()
        self._done.add_done_callback(_close)

    def _run(self) -> None:
        try:
            self._done.set_result(self._begin())
        except BaseException as error:
            self._done.set_exception(error)

    def _begin(self) -> tuple[Channel, Message]:
        channel = self._welcomed()
        try:
            while self._child and not self._is_awaited.wait(POLL_S):
                self._check()
            self._told = "its engine has not started yet"
            channel.send("start", {"engine_args": self._engine_args})
            answer = self._next(channel)
            if answer.kind != "ready":
                raise ValueError(f"cannot run: {answer.fields.get('reason', answer.kind)}")
        except BaseException:
            channel.close()
            raise
        return channel, answer

    def _welcomed(self) -> Channel:
        """Tries until it has a worker, is given up, or knows that it cannot work."""
        pause_s, num_refusals = FIRST_PAUSE_S, 0
        while num_refusals < MAX_REFUSALS:
            try:
                return self._greeted(connect(self._address, self._key))
            except KeyRefusedError as error:
                num_refusals, self._told = num_refusals + 1, f"cannot be reached: {error}"
            except (OSError, EOFError) as error:
                is_absent = isinstance(error, ConnectionRefusedError) and not self._child
                hint = "; is `vcr1-fast serve` running there?" if is_absent else ""
                num_refusals, self._told = 0, f"{error}{hint}"
            self._check()
            self._given_up.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise KeyRefusedError(self._told)

    def _greeted(self, channel: Channel) -> Channel:
        """Raises ConnectionError when it serves another trainer, ValueError when it will never take this one."""
        try:
            channel.send("hello", {"version": VERSION})
            answer = self._next(channel)
            if answer.kind != "welcome":
                reason = str(answer.fields.get("reason", answer.kind))
                raise ConnectionError(reason) if answer.kind == "busy" else ValueError(reason)
        except BaseException:
            channel.close()
            raise
        return channel

    def _next(self, channel: Channel) -> Message:
        while True:
            try:
                return channel.receive(POLL_S)
            except TimeoutError:
                self._check()

    def _check(self) -> None:
        if self._given_up.is_set() or (self._child and self._child.exit_code is not None):
            raise ValueError(ENDED)


def _close(done: Future[tuple[Channel, Message]]) -> None:
    if done.exception() is None:
        done.result()[0].close()
