"""Messages between machines, as messages.py has them on one: over TCP, tensors inside, every message signed.

    frame    magic, bytes of the header, bytes of the tensors | header (JSON) | tag | tensors | tag, if there are any

A tag is HMAC-SHA256 over the frame's number and everything of the frame before it, with a key of this connection and
direction (handshake.py). A frame that somebody changed, repeated, left out or put in is refused, its header
before it is parsed and before memory is taken for its tensors. Nothing is encrypted: pixels, answers and weights can be
read by who sees the packets. So bind to a loopback or private address, and between sites put the connection through
WireGuard or `ssh -L`.

What it costs: SHA-256 goes at 1.8 GB/s on one core with SHA instructions (blake2b: 0.9); with it a core sends 1.2 GB/s
and receives 0.7. So the pixels of a video of 3,584 tokens (17 MB, pixels.py) take 25 ms, and the 17 GB of a 7B
model in bfloat16 25 s: between GPUs the weights of a step go by NCCL instead (delivery.py), and here only those
of a worker that was started again.

Runs in the trainer, in `vcr1-fast serve` and in the worker's interpreter: only the standard library and torch.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.handshake import KEY_BYTES, SessionKeys, greet, introduce
from vcr1_fast.rollout.sgl.messages import (
    HANDSHAKE_S,
    MAX_HEADER_BYTES,
    Channel,
    Message,
    SharedBytes,
    deadline_of,
    flat_bytes,
    header_bytes,
    parse_header,
    shaped,
    tensor_entry,
    tensor_layout,
)

Address = tuple[str, int]  # host and port
MAX_TENSOR_BYTES = 8 << 30  # of one message; the largest weight of a 7B model has 1.1 GB in bfloat16
_FRAME = struct.Struct("<4sIQ")  # magic, bytes of the header, bytes of the tensors
_MAGIC = b"vcrT"
_PIECE_BYTES = 1 << 20  # signed while it is in the cache
_BACKLOG = 128  # beyond it a connection is tried again 1 s later
# A peer whose machine is gone sends nothing at all. Unused, a connection ends 60 s later; with bytes on their way after
# 300 s, because a trainer that computes may leave full buffers for a while.
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 300_000,
    socket.TCP_NODELAY: 1,
}


class TcpChannel(Channel):
    """A `Channel` to another machine. One process can hand it on to another between two messages."""

    def __init__(self, connection: socket.socket, keys: SessionKeys, num_sent: int = 0, num_received: int = 0) -> None:
        super().__init__(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._keys = keys
        self._num_sent, self._num_received = num_sent, num_received

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor | SharedBytes] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """As `Channel.send`, with tensors of up to MAX_TENSOR_BYTES in all; raises ValueError above that."""
        values = {
            name: value.bytes_B if isinstance(value, SharedBytes) else value for name, value in (tensors or {}).items()
        }
        parts = [flat_bytes(value) for value in values.values()]
        header = header_bytes(kind, fields, [tensor_entry(name, value) for name, value in values.items()])
        num_bytes = sum(part.numel() for part in parts)
        if num_bytes > MAX_TENSOR_BYTES:
            raise ValueError(f"message {kind!r} has {num_bytes} bytes of tensors, wanted <= {MAX_TENSOR_BYTES}")
        start, deadline = _FRAME.pack(_MAGIC, len(header), num_bytes) + header, deadline_of(timeout_s)
        with self._send_lock:
            tag = _tag(self._keys.send, self._num_sent)
            self._num_sent += 1
            tag.update(start)
            self._write(start + tag.digest(), deadline)
            for part_B in parts:
                for piece in part_B.split(_PIECE_BYTES):
                    view = piece.numpy().data
                    tag.update(view)
                    self._write(view, deadline)
            if num_bytes:
                self._write(tag.digest(), deadline)

    def receive(self, timeout_s: float | None = None) -> Message:
        """As `Channel.receive`. ValueError also for a message that was not signed by the other side as its next one."""
        deadline = deadline_of(timeout_s)
        start, descriptors = self._take(_FRAME.size, deadline)
        assert not descriptors, "TCP passes none"
        start += self._read(_FRAME.size - len(start), deadline)
        magic, num_header, num_bytes = _FRAME.unpack(start)
        if magic != _MAGIC or num_header > MAX_HEADER_BYTES or num_bytes > MAX_TENSOR_BYTES:
            raise ValueError(f"got {start[:4]!r}, {num_header} and {num_bytes} bytes, wanted a message")
        tag = _tag(self._keys.receive, self._num_received)
        header = self._read(num_header, deadline)
        tag.update(start + header)
        self._require(tag, deadline)
        self._num_received += 1
        kind, fields, entries = parse_header(header)
        layouts = [tensor_layout(entry) for entry in entries]
        if sum(size for _, size in layouts) != num_bytes:
            raise ValueError(f"the tensors of message {kind!r} do not make the {num_bytes} bytes that it has")
        tensors: dict[str, Tensor] = {}
        for entry, (dtype, size) in zip(entries, layouts, strict=True):
            flat_B = torch.empty(size, dtype=torch.uint8)
            for piece in flat_B.split(_PIECE_BYTES):
                view = piece.numpy().data
                self._fill(view, deadline)
                tag.update(view)
            tensors[entry["name"]] = shaped(flat_B, entry, dtype)
        if num_bytes:
            self._require(tag, deadline)
        return Message(kind, fields, tensors)

    def state(self) -> dict[str, Any]:
        """JSON for `restored`: secret, for a process of this machine alone."""
        keys = {"send": self._keys.send.hex(), "receive": self._keys.receive.hex()}
        return {**keys, "num_sent": self._num_sent, "num_received": self._num_received}

    @classmethod
    def restored(cls, connection: socket.socket, state: Mapping[str, Any]) -> TcpChannel:
        """The channel that another process had on this connection."""
        keys = SessionKeys(bytes.fromhex(state["send"]), bytes.fromhex(state["receive"]))
        return cls(connection, keys, int(state["num_sent"]), int(state["num_received"]))

    def release(self) -> None:
        """Close it here; the process that it was handed over to keeps the connection."""
        self._socket.close()

    @property
    def connection(self) -> socket.socket:
        """To hand over."""
        return self._socket

    def _require(self, tag: hmac.HMAC, deadline: float | None) -> None:
        if not hmac.compare_digest(self._read(tag.digest_size, deadline), tag.digest()):
            raise ValueError(f"message {self._num_received} is not signed by the peer that this connection began with")


class TcpListener:
    """Where trainers connect to one worker."""

    def __init__(self, address: Address) -> None:
        """Port 0 takes a free one. Raises OSError when the address is not of this machine, or taken."""
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        self._socket = socket.create_server(address, family=family, backlog=_BACKLOG)
        self.address: Address = self._socket.getsockname()[:2]

    def accept(self, timeout_s: float) -> tuple[socket.socket, Address] | None:
        """Somebody, see `greeted`, and the address; None when nobody came in time. Raises OSError."""
        self._socket.settimeout(timeout_s)
        try:
            connection, peer = self._socket.accept()
        except TimeoutError:
            return None
        return connection, peer[:2]

    def close(self) -> None:
        """Also wakes a thread that waits in `accept`; it gets OSError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def greeted(connection: socket.socket, key: bytes) -> TcpChannel:
    """The listener's side of `handshake.greet`; raises as that does. Takes HANDSHAKE_S at most."""
    return TcpChannel(connection, greet(connection, key, HANDSHAKE_S))


def connect_tcp(address: Address, key: bytes, timeout_s: float) -> TcpChannel:
    """The trainer's side of `greeted`. Raises as `handshake.introduce`, and OSError when nobody
    listens there; `timeout_s` for each of the two steps."""
    connection = socket.create_connection(address, timeout=timeout_s)
    try:
        return TcpChannel(connection, introduce(connection, key, timeout_s))
    except BaseException:
        connection.close()
        raise


def _tag(key: bytes, number: int) -> hmac.HMAC:
    assert len(key) == KEY_BYTES
    return hmac.new(key, number.to_bytes(8, "little"), "sha256")
