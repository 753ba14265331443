"""The worker's end: one address, and behind it this process, which serves one trainer and then ends.

    hello {version}    welcome {} | busy {reason} | unfit {reason}; who is welcome is the trainer, see worker.py
    status             status {trainer, and the facts that the worker has noted}: `vcr1-fast serve` asks
    close              the worker ends, as when its trainer leaves

A thread of its own has the socket (ZeroMQ's belong to one thread): so it answers while SGLang starts or computes. Who
has not the key is sent away by CURVE and by ZAP (rfc.zeromq.org/spec/27), before anything of his is read.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import zmq
from torch import Tensor
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from vcr1_fast.rollout.sgl.channel import VERSION, curve_keys, secure, short
from vcr1_fast.rollout.sgl.messages import Message, decode, encode

LINGER_S = 5.0  # for the last messages, when the process ends
_LEAVE = b""  # to the thread: close


@dataclass(frozen=True)
class _Peer:
    """Somebody with the key."""

    identity: bytes
    descriptor: int  # of the connection
    address: str


class Door:
    """Any thread may `send`, one may `receive`."""

    def __init__(self, address: str, key: bytes) -> None:
        """Raises zmq.ZMQError when the address cannot be had."""
        self.facts: Mapping[str, Any] = {}
        self.when_over: Callable[[], None] | None = None  # called by the thread when the trainer leaves
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its own: ZAP has one place in a context
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        public_key = curve_keys(key, "trainer")[0]
        only = SimpleNamespace(callback=lambda _domain, theirs: theirs == public_key)  # ZAP asks it who may come in
        self._authenticator.configure_curve_callback("worker", only)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.zap_domain = b"worker"
        secure(self._router, address, key, "worker")
        self._router.router_mandatory = True
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._orders, self._lock = self._context.socket(zmq.PAIR), threading.Lock()
        self._orders.sndhwm = 0
        self._orders.bind("inproc://orders")
        try:
            with short(address) as name:
                self._router.bind(name)
        except BaseException:
            self._end_context(linger_s=0.0)
            raise
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._connected: set[int] = set()  # descriptors of all connections
        self._trainer: _Peer | None = None
        self._is_open, self._is_over = True, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the trainer has left, or `vcr1-fast serve` wants the end."""
        return self._is_over

    def send(
        self, kind: str, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """To the trainer; returns at once. One that has left gets nothing."""
        frames, _ = encode(kind, fields or {}, tensors or {})
        with self._lock:
            self._orders.send_multipart(frames)

    def receive(self) -> Message:
        """What the trainer says next. Raises EOFError when it has left, or there is to be none."""
        message = self._received.get()
        if message is None:
            self._received.put(None)
            raise EOFError("the trainer has left")
        return message

    def close(self) -> None:
        """After what was sent has left, or LINGER_S; a second call does nothing."""
        with self._lock:
            if self._orders.closed:
                return
            self._orders.send(_LEAVE)
        self._thread.join()
        self._end_context(LINGER_S)

    def _end_context(self, linger_s: float) -> None:
        self._authenticator.stop()
        self._context.destroy(linger=int(1000 * linger_s))

    def _run(self) -> None:
        orders = self._context.socket(zmq.PAIR)
        orders.rcvhwm = 0
        orders.connect("inproc://orders")
        poller = zmq.Poller()
        for socket in (self._router, self._monitor, orders):
            poller.register(socket, zmq.POLLIN)
        try:
            while self._is_open:
                self._turn(dict(poller.poll()), orders)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # nobody is heard any more; the trainer starts another worker

    def _turn(self, ready: Mapping[Any, int], orders: zmq.Socket[bytes]) -> None:
        if self._monitor in ready:
            self._note_connections()
        if self._router in ready:
            identity, *frames = self._router.recv_multipart(copy=False)
            if frames:
                self._take(identity.bytes, frames)
        if orders in ready:
            frames = orders.recv_multipart()
            self._is_open = frames != [_LEAVE]
            if self._is_open and self._trainer is not None:
                self._tell(self._trainer.identity, frames)

    def _note_connections(self) -> None:
        while self._monitor.poll(0):
            told = recv_monitor_message(self._monitor)
            event, descriptor = told["event"], int(told["value"])
            if event == zmq.EVENT_ACCEPTED:
                self._connected.add(descriptor)
            else:
                self._connected.discard(descriptor)
                if self._trainer is not None and self._trainer.descriptor == descriptor:
                    self._end()

    def _take(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        is_trainer = self._trainer is not None and self._trainer.identity == identity
        try:
            message = decode([frame.buffer for frame in frames])
        except ValueError:
            if is_trainer:  # nothing can be answered
                raise
            message = Message("nothing")
        if is_trainer:
            self._received.put(message)
        elif message.kind == "hello":
            self._admit(_Peer(identity, frames[0].get(zmq.SRCFD), _address_of(frames[0])), message)
        elif message.kind == "status":
            trainer = self._trainer.address if self._trainer else ""
            self._tell(identity, encode("status", {**self.facts, "trainer": trainer}, {})[0])
        elif message.kind == "close":
            self._end()
        else:
            self._tell(identity, encode("unfit", {"reason": f"it said {message.kind!r:.80} before hello"}, {})[0])

    def _admit(self, peer: _Peer, hello: Message) -> None:
        self._note_connections()  # one that has left already would keep the others out for ever
        kind, fields = "welcome", dict[str, Any]()
        if hello.fields.get("version") != VERSION:
            reason = f"it is {VERSION} there and {hello.fields.get('version')!s:.80} here: install the same one"
            kind, fields = "unfit", {"reason": reason}
        elif self._is_over:
            kind, fields = "busy", {"reason": "its last worker is being ended"}
        elif self._trainer is not None:
            kind, fields = "busy", {"reason": f"it serves the trainer {self._trainer.address}"}
        elif peer.descriptor in self._connected:
            self._trainer = peer
        self._tell(peer.identity, encode(kind, fields, {})[0])

    def _tell(self, identity: bytes, frames: list[memoryview] | list[bytes]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it has left
            self._router.send_multipart([identity, *frames])

    def _end(self) -> None:
        self._is_over = True
        self._received.put(None)
        if self.when_over is not None:
            self.when_over()


def _address_of(frame: zmq.Frame) -> str:
    with contextlib.suppress(zmq.ZMQError):  # a Unix socket has none
        return str(frame.get("Peer-Address"))
    return "of this machine"
