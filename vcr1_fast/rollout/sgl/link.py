"""What the trainer has of one rollout worker, wherever that runs: a connection, questions and answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from vcr1_fast.rollout.sgl.libraries import Libraries
from vcr1_fast.rollout.sgl.messages import Channel, Message


class WorkerGoneError(Exception):
    """The worker ended or does not answer. The engine starts another one.

    `is_port_taken`: in its start, by a port that it had chosen and another process took before it was bound.
    """

    def __init__(self, what: str, *, is_port_taken: bool = False) -> None:
        super().__init__(what)
        self.is_port_taken = is_port_taken


class WorkerLink(ABC):
    """One worker, over all its restarts. `start` begins, `wait_ready` waits until its engine is up.

    Two kinds: a child process (process.py), and one that `vcr1-fast serve` runs elsewhere (remote.py).
    """

    def __init__(self, name: str) -> None:
        """`name`: for messages to people."""
        self.name = name
        self.limits: Mapping[str, int] = {}  # what requests are checked against, see video.check_request
        self.version = ""  # of SGLang
        self.libraries = Libraries("", "", "")
        self.num_starts = 0
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

    @abstractmethod
    def start(self) -> None:
        """Begin, and return at once; ends what was there before. Raises OSError when that cannot work at all."""

    @abstractmethod
    def wait_ready(self, timeout_s: float) -> None:
        """Raises WorkerGoneError, saying why, when the engine does not come up in time."""

    @abstractmethod
    def kill(self) -> None:
        """End it now."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end; end it if it does not."""

    def post(self, fields: Mapping[str, Any], tensors: Mapping[str, Any], timeout_s: float) -> None:
        """Send a `generate` request. Raises WorkerGoneError or OSError when the worker does not take it."""
        self.channel.send("generate", fields, tensors, timeout_s=timeout_s)

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

    def _begin_engine(self, channel: Channel, engine_args: Mapping[str, Any], timeout_s: float) -> None:
        """Over a fresh channel: has the worker make its engine, and waits for it. Raises WorkerGoneError."""
        self._channel = channel
        try:
            channel.send("start", {"engine_args": dict(engine_args)}, timeout_s=timeout_s)
            ready = channel.receive(timeout_s)
        except (OSError, EOFError, ValueError) as error:
            raise self._gone(f"did not get ready within {timeout_s:g} s ({error})") from error
        if ready.kind == "absent":  # the worker's log says no more than this
            self.kill()
            raise WorkerGoneError(f"cannot run: {ready.fields['reason']}")
        if ready.kind != "ready":
            raise self._gone(f"cannot run: {ready.fields.get('reason', ready.kind)}")
        self.limits, self.version = ready.fields["limits"], ready.fields["version"]
        self.libraries = Libraries(**ready.fields["libraries"])

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    @abstractmethod
    def _gone(self, what: str) -> WorkerGoneError:
        """Ends the worker; the error to raise, with what is known of its end."""
