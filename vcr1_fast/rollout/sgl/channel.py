"""The trainer's end of a connection to a rollout worker: ZeroMQ with CURVE, to another machine and on the same one.

    tcp://host:port    a worker that `vcr1-fast serve` runs elsewhere
    ipc://path         a child of the trainer: a Unix socket in a folder that only this user can enter

CURVE (rfc.zeromq.org/spec/26) encrypts and authenticates every frame. Both ends have the same 32 secret bytes, of which
each derives the Curve25519 keys of both sides: the trainer knows what the worker's public key must be, and the worker
lets nobody in who has another one than the trainer's (endpoint.py).

A connection is made once: when it ends, the worker is gone. Runs in the trainer and in the worker's interpreter: only
the standard library, torch and pyzmq.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from socket import SOCK_STREAM, getaddrinfo
from typing import Any, Literal

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from vcr1_fast import __version__
from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.sgl.messages import MAX_FRAME_BYTES, Message, SharedBytes, decode, encode

VERSION = f"vcr1-fast {__version__}, messages 6"  # the number goes up when messages change their form
HANDSHAKE_S = 10.0  # a stranger that says nothing must not hold anybody up
# Between machines a peer that answers nothing for so long is gone. On one machine the kernel tells, and a trainer that
# is stopped by hand keeps its workers.
HEARTBEAT_S, HEARTBEAT_LIMIT_S = 10.0, 60.0
NEVER_MS = 24 * 3_600_000  # until ZeroMQ connects again; without that, what the other side said last would be lost
# Without HANDSHAKE_FAILED_PROTOCOL: where that is told (libzmq 4.3.5), a connection with a frame that somebody changed
# is not closed, but no longer read
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_EVENTS |= zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class KeyRefusedError(Exception):
    """Somebody answers, and takes no message of one who has this key."""


class Channel:
    """For one thread at a time."""

    def __init__(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], *, is_local: bool) -> None:
        self._socket, self._monitor, self._is_local = socket, monitor, is_local
        self._is_over = False
        self._lent: dict[object, list[SharedBytes]] = {}  # by id of the request: what its receiver may still map

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or the other side is known to be gone; takes nothing of what that sent."""
        while not self._is_over and self._monitor.poll(0):
            self._is_over = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
        return self._is_over

    def send(
        self, kind: str, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
    ) -> None:
        """Returns at once: the message waits in memory. Raises ConnectionError when the other side is gone."""
        if self.is_over:
            raise ConnectionError("the other side is gone")
        frames, lent = encode(kind, fields or {}, tensors or {}, by_reference=self._is_local)
        if lent:
            self._lent[(fields or {}).get("id")] = lent
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float) -> Message:
        """Raises TimeoutError, EOFError when the other side is gone, ValueError for what is no message."""
        deadline = time.monotonic() + timeout_s
        while True:
            was_over = self.is_over  # what was sent before the end is there by then
            if not self._socket.closed and self._socket.poll(0):
                message = decode([frame.buffer for frame in self._socket.recv_multipart(copy=False)])
                self._lent.pop(message.fields.get("id"), None)
                return message
            if was_over:
                raise EOFError("the connection is closed")
            if time.monotonic() >= deadline:
                raise TimeoutError("the other side did not send a message in time")
            ready_ones([self], deadline - time.monotonic())

    def close(self, linger_s: float = 0.0) -> None:
        """What was sent may still leave within `linger_s`."""
        self._is_over = True
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=int(1000 * linger_s))
        self._lent.clear()


def ready_ones(channels: Sequence[Channel], timeout_s: float) -> list[Channel]:
    """Those that have a message, or are over; waits for the first of them."""
    poller = zmq.Poller()
    for channel in channels:
        if not channel._socket.closed:
            poller.register(channel._socket, zmq.POLLIN)
            poller.register(channel._monitor, zmq.POLLIN)
    ready = dict(poller.poll(max(0, int(1000 * timeout_s))))
    return [c for c in channels if c._socket in ready or c._monitor in ready or c._socket.closed]


def connect(address: str, key: bytes, timeout_s: float = HANDSHAKE_S) -> Channel:
    """A connection to a worker that has the key. Raises KeyRefusedError when it has another one, or is no worker, and
    OSError when nobody listens there, or answers in time."""
    *others, last = _resolved(address)
    for other in others:  # a name may stand for addresses of IPv6 and of IPv4, and be served at one
        with contextlib.suppress(ConnectionRefusedError, TimeoutError):
            return _connect_to(other, key, timeout_s)
    return _connect_to(last, key, timeout_s)


def _resolved(address: str) -> list[str]:
    """ZeroMQ itself would look a wrong name up again and again. Raises OSError for one."""
    if not address.startswith("tcp://"):
        return [address]
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    found = getaddrinfo(host.strip("[]"), int(port), type=SOCK_STREAM)
    return [f"tcp://{show((str(target[0]), int(port)))}" for *_, target in found]


def _connect_to(address: str, key: bytes, timeout_s: float) -> Channel:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    secure(socket, address, key, "trainer")
    socket.reconnect_ivl = NEVER_MS
    monitor = socket.get_monitor_socket(_EVENTS)
    channel = Channel(socket, monitor, is_local=address.startswith("ipc://"))
    try:
        with short(address) as name:
            socket.connect(name)
            _await_handshake(monitor, timeout_s)
    except BaseException:
        channel.close()
        raise
    return channel


def secure(socket: zmq.Socket[bytes], address: str, key: bytes, side: Literal["trainer", "worker"]) -> None:
    """What both ends set before they connect or bind."""
    socket.curve_publickey, socket.curve_secretkey = curve_keys(key, side)
    if side == "worker":
        socket.curve_server = True
    else:
        socket.curve_serverkey = curve_keys(key, "worker")[0]
    socket.sndhwm = socket.rcvhwm = 0  # bounded by what is asked for: rollout.sglang.max_inflight, one bucket
    socket.maxmsgsize = 2 * MAX_FRAME_BYTES
    socket.handshake_ivl = int(1000 * HANDSHAKE_S)
    socket.ipv6 = "[" in address
    if address.startswith("tcp://"):
        socket.heartbeat_ivl, socket.heartbeat_timeout = int(1000 * HEARTBEAT_S), int(1000 * HEARTBEAT_LIMIT_S)


def curve_keys(key: bytes, side: Literal["trainer", "worker"]) -> tuple[bytes, bytes]:
    """(public, secret) of a side, in Z85: any 32 bytes are a secret key of Curve25519."""
    secret = z85.encode(hmac.digest(key, f"vcr1-fast {side}".encode(), "sha256"))
    return zmq.curve_public(secret), secret


@contextlib.contextmanager
def short(address: str) -> Iterator[str]:
    """The same address under a name that fits into the 107 bytes of a Unix socket's, however long the folder's is."""
    if not address.startswith("ipc://"):
        yield address
        return
    path = address.removeprefix("ipc://")
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"ipc:///proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _await_handshake(monitor: zmq.Socket[bytes], timeout_s: float) -> None:
    """Raises as `connect`. Of a wrong key a peer says nothing, but closes the connection, as another program does."""
    deadline, is_connected = time.monotonic() + timeout_s, False
    while monitor.poll(max(0, int(1000 * (deadline - time.monotonic())))):
        told = recv_monitor_message(monitor)
        event = told["event"]
        is_connected |= event == zmq.EVENT_CONNECTED
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and told["value"] != errno.EPIPE:
            raise ConnectionError(f"it broke the handshake off ({os.strerror(told['value'])})")
        if event != zmq.EVENT_CONNECTED:
            if not is_connected:
                raise ConnectionRefusedError("nobody listens there")
            raise KeyRefusedError("it has another key than we have, or is another program than a rollout worker")
    raise TimeoutError("it says nothing")
