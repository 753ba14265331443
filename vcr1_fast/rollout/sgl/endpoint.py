"""The worker's end: one address, and behind it this process, which serves one trainer and then ends.

    start {version, ...}    starting to the first one, who is the trainer; to others busy {reason} or unfit {reason}

Who has not the key is sent away by CURVE and by ZAP (rfc.zeromq.org/spec/27), before anything of his is read. A thread
looks after the trainer's connection while SGLang starts or computes, and shows `vcr1-fast serve` that it lives: the
file of what this worker is gets a new time. When serve takes that file away, the worker ends in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import zmq
from torch import Tensor
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from vcr1_fast.rollout.sgl.channel import VERSION, curve_keys, secure, short
from vcr1_fast.rollout.sgl.messages import Message, decode, encode

# How a worker is started, and how one ends that has no SGLang; the last line that it prints then says so
KEY_VARIABLE, STATUS_VARIABLE, NO_SGLANG = "VCR1_WORKER_KEY", "VCR1_WORKER_STATUS", os.EX_CONFIG
LINGER_S = 5.0  # for the last messages, when the process ends
POLL_MS = 100
LATE_S = 2.0  # that a message may be here before the thread has heard of its connection


class Endpoint:
    """For the thread that made it. `attach` gives what comes to a loop, else `receive` waits for it."""

    def __init__(
        self, address: str, key: bytes, status: Path | None = None, when_over: Callable[[], None] = lambda: None
    ) -> None:
        """`status`: see `tell`; `when_over`: called, perhaps in another thread, when the trainer is gone or says what
        cannot be read, and when this process's parent is gone.

        Raises zmq.ZMQError when the address cannot be had."""
        self.is_over = False  # nothing of the trainer comes any more
        self._status, self._when_over, self._facts = status, when_over, dict[str, str]()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its own: ZAP has one place in a context
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        public_key = curve_keys(key, "trainer")[0]
        only = SimpleNamespace(callback=lambda _domain, theirs: theirs == public_key)  # ZAP asks it who may come in
        self._authenticator.configure_curve_callback("worker", only)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.zap_domain = b"worker"
        secure(self._router, address, key, "worker")
        self._router.router_mandatory = True  # who has left is an error, and not passed over
        monitor = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._connected: set[int] = set()  # descriptors of all connections
        self._trainer, self._descriptor, self._address = b"", -1, ""  # identity, connection and place of the trainer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._take: Callable[[Message], None] = lambda _: None
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(monitor,), daemon=True)
        self._thread.start()
        try:
            with short(address) as name:
                self._router.bind(name)
        except BaseException:
            self.close()
            raise

    def tell(self, facts: Mapping[str, str]) -> None:
        """What `vcr1-fast serve` is to know of this worker, beside the trainer: in the file `status`, as JSON."""
        told, status = self._facts | dict(facts), self._status
        if status is not None:
            partial = status.with_suffix(".partial")
            partial.write_text(json.dumps(told), encoding="utf-8")
            partial.rename(status)
        self._facts = told  # last: from now on the thread takes the file's absence for the end of serve

    def send(
        self, kind: str, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """To the trainer; returns at once. One that has left gets nothing."""
        self._send_to(self._trainer, encode(kind, fields or {}, tensors or {})[0])

    def receive(self) -> Message:
        """What the trainer says next. Raises EOFError when it has left, or says what is no message."""
        while True:
            message = self._next()
            if message is not None:
                return message
            if self.is_over:
                raise EOFError("the trainer has left")
            self._router.poll(POLL_MS)

    def attach(self, loop: asyncio.AbstractEventLoop, take: Callable[[Message], None]) -> None:
        """Everything that the trainer says from now on goes to `take`, in the loop, which this thread runs."""
        self._loop, self._take = loop, take
        loop.add_reader(self._router.fileno(), self._pass_on)
        loop.call_soon(self._pass_on)

    def close(self) -> None:
        """After what was sent has left, or LINGER_S; a second call does nothing."""
        if self._router.closed:
            return
        self._router.disable_monitor()  # before nobody reads it: ZeroMQ's thread would wait for a reader for ever
        self._is_closing.set()
        self._thread.join()
        self._authenticator.stop()
        self._router.close(linger=int(1000 * LINGER_S))
        self._context.destroy(linger=int(1000 * LINGER_S))

    def _pass_on(self) -> None:
        while (message := self._next()) is not None:
            self._take(message)

    def _next(self) -> Message | None:
        """Of the trainer, if there is one here. Answers others."""
        while self._router.poll(0):
            identity, *frames = self._router.recv_multipart(copy=False)
            is_trainer = identity.bytes == self._trainer
            try:
                message = decode([frame.buffer for frame in frames])
            except ValueError as error:
                if is_trainer:  # nothing can be answered
                    print(f"the trainer sent what cannot be read: {error}", file=sys.stderr)
                    self._end()
                    return None
                message = Message("nothing")
            if is_trainer or (frames and self._admits(identity.bytes, frames[0], message)):
                return message
        return None

    def _admits(self, identity: bytes, frame: zmq.Frame, message: Message) -> bool:
        """Whether he who said that is the trainer from now on; tells him why not."""
        version, kind, reason = message.fields.get("version"), "unfit", ""
        if message.kind != "start":
            reason = f"it said {message.kind!r:.80} before start"
        elif version != VERSION:
            reason = f"it is {VERSION} there and {version!s:.80} here: install the same one"
        elif self._trainer:
            kind, reason = "busy", f"it serves the trainer {self._address}"
        fields = {"reason": reason} if reason else {}
        if not self._send_to(identity, encode(kind if reason else "starting", fields, {})[0]) or reason:
            return False
        descriptor, deadline = int(frame.get(zmq.SRCFD)), time.monotonic() + LATE_S
        while descriptor not in self._connected and time.monotonic() < deadline:
            time.sleep(0.001)
        self._address = _address_of(frame)
        self._trainer, self._descriptor = identity, descriptor
        if descriptor not in self._connected:  # it has left already
            self._trainer, self._descriptor = b"", -1
            return False
        self.tell({"trainer": self._address})
        return True

    def _send_to(self, identity: bytes, frames: list[memoryview]) -> bool:
        """Whether he is still there."""
        if self._loop is not None:  # sending may take the sign away that something has come
            self._loop.call_soon(self._pass_on)
        try:
            self._router.send_multipart([identity, *frames])
        except zmq.ZMQError:
            return False
        return True

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        parent = os.getppid()
        while not self._is_closing.is_set():
            if os.getppid() != parent:
                self._when_over()
            if self._status is not None and self._facts:
                try:
                    os.utime(self._status)
                except FileNotFoundError:
                    self._status = None
                    self._close_in_order()
            if not monitor.poll(POLL_MS):
                continue
            told = recv_monitor_message(monitor)
            descriptor = int(told["value"])
            if told["event"] == zmq.EVENT_ACCEPTED:
                self._connected.add(descriptor)
                continue
            self._connected.discard(descriptor)
            if descriptor == self._descriptor:
                self._end()
        monitor.close(linger=0)

    def _close_in_order(self) -> None:
        """As if the trainer had said it; without SGLang's loop at once."""
        if self._loop is None:
            self._end()
        else:
            self._loop.call_soon_threadsafe(self._take, Message("close"))

    def _end(self) -> None:
        self.is_over = True
        self._when_over()


def _address_of(frame: zmq.Frame) -> str:
    with contextlib.suppress(zmq.ZMQError):  # a Unix socket has none
        return str(frame.get("Peer-Address"))
    return "of this machine"
