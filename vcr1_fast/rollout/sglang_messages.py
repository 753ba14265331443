"""Messages between the trainer and a rollout worker on the same machine: a JSON header and named tensors, no pickle.

A message is a preamble, the header, and the bytes of its small tensors, over a Unix socket. Tensors from 64 KiB on
(pixels, weights) do not go through the socket: they lie in anonymous memory (memfd) whose descriptor is passed along,
so that nothing is copied twice, nothing has a name that could be left behind, and the size of /dev/shm does not matter.

A socket and not a message queue, because the end of a killed process is then seen at once, as the end of the stream.
Runs in the trainer and in the worker's interpreter: only the standard library, numpy and torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY_VARIABLE = "VCR1_WORKER_KEY"  # environment variable of the worker that holds the key, hexadecimal
SHARED_FROM_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 28
MAX_INLINE_BYTES = 1 << 28
MAX_FILES = 64  # Linux passes at most 253 descriptors at once
_PREAMBLE = struct.Struct("<4sIII")  # magic, bytes of the header, bytes of inline tensors, descriptors
_MAGIC = b"vcr1"
_NONCE_BYTES = 32


@dataclass(frozen=True)
class Message:
    """What was received. `fields` are JSON values."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class SharedBytes:
    """Anonymous shared memory as a tensor [num_bytes] uint8; freed when both sides have let go of it."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError when the memory cannot be had."""
        self.descriptor = os.memfd_create("vcr1-tensor", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, num_bytes)
        self.bytes_B: Tensor = _mapped(self.descriptor, num_bytes)

    def close(self) -> None:
        """Give the descriptor back; the memory stays as long as a tensor points into it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


class Channel:
    """One end of a connection. `send` may be called by several threads, `receive` by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor | SharedBytes] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Raises TimeoutError when the other side did not take it in time, OSError when it is gone; then `close`."""
        entries: list[dict[str, Any]] = []
        inline: list[bytes] = []
        shared: list[SharedBytes] = []
        for name, value in (tensors or {}).items():
            entry, payload = _packed(name, value)
            entries.append(entry)
            inline += [payload] if isinstance(payload, bytes) else []
            shared += [payload] if isinstance(payload, SharedBytes) else []
        header = json.dumps({"kind": kind, "fields": fields or {}, "tensors": entries}).encode()
        body = b"".join([header, *inline])
        if len(header) > MAX_HEADER_BYTES or len(body) - len(header) > MAX_INLINE_BYTES or len(shared) > MAX_FILES:
            raise ValueError(f"message {kind!r} is too large: {len(body)} bytes and {len(shared)} large tensors")
        preamble = _PREAMBLE.pack(_MAGIC, len(header), len(body) - len(header), len(shared))
        with self._send_lock:
            self._socket.settimeout(timeout_s)
            sent = socket.send_fds(self._socket, [preamble], [memory.descriptor for memory in shared])
            self._socket.sendall(preamble[sent:] + body)

    def receive(self, timeout_s: float | None = None) -> Message:
        """Raises TimeoutError, EOFError when the other side is gone, ValueError for bytes that are no message."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._settle(deadline)
        try:
            preamble, descriptors, _, _ = socket.recv_fds(self._socket, _PREAMBLE.size, MAX_FILES)
        except ConnectionError as error:
            raise EOFError("the other side is gone") from error
        try:
            if not preamble:
                raise EOFError("the other side has closed the connection")
            preamble += self._read(_PREAMBLE.size - len(preamble), deadline)
            magic, header_bytes, inline_bytes, num_files = _PREAMBLE.unpack(preamble)
            is_sane = header_bytes <= MAX_HEADER_BYTES and inline_bytes <= MAX_INLINE_BYTES
            if magic != _MAGIC or not is_sane or num_files != len(descriptors):
                raise ValueError(f"got {preamble[:4]!r} and {len(descriptors)} descriptors, wanted a message")
            header = json.loads(self._read(header_bytes, deadline))
            tensors = _unpacked(header["tensors"], self._read(inline_bytes, deadline), descriptors)
            return Message(header["kind"], header["fields"], tensors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        self._socket.close()

    def _read(self, num_bytes: int, deadline: float | None) -> bytes:
        buffer = bytearray(num_bytes)
        view, filled = memoryview(buffer), 0
        while filled < num_bytes:
            self._settle(deadline)
            try:
                count = self._socket.recv_into(view[filled:])
            except ConnectionError as error:
                raise EOFError("the other side is gone") from error
            if count == 0:
                raise EOFError("the other side went away in the middle of a message")
            filled += count
        return bytes(buffer)

    def _settle(self, deadline: float | None) -> None:
        if deadline is not None and deadline <= time.monotonic():
            raise TimeoutError("no message in time")
        self._socket.settimeout(None if deadline is None else deadline - time.monotonic())


class Listener:
    """Where one worker connects to: a socket in a folder that only this user can enter, and a random key."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / f"worker-{secrets.token_hex(4)}.sock")
        self.key = secrets.token_bytes(_NONCE_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.address)
        self._socket.listen(4)

    def accept(self, timeout_s: float) -> Channel | None:
        """The channel to a peer that knows the key; None when none came in time, or one without the key."""
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        connection.settimeout(10.0)  # a stranger that says nothing must not hold the run up
        nonce = secrets.token_bytes(_NONCE_BYTES)
        try:
            connection.sendall(nonce)
            answer = _exactly(connection, 2 * _NONCE_BYTES)
            if hmac.compare_digest(answer[:_NONCE_BYTES], _proof(self.key, b"worker", nonce)):
                connection.sendall(_proof(self.key, b"trainer", answer[_NONCE_BYTES:]))
                return Channel(connection)
        except (OSError, EOFError):
            pass
        connection.close()
        return None

    def close(self) -> None:
        self._socket.close()
        Path(self.address).unlink(missing_ok=True)


def connect(address: str, key: bytes) -> Channel:
    """The worker's side of `Listener.accept`. Raises OSError or EOFError; PermissionError when the key is another."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    connection.settimeout(60.0)
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(_proof(key, b"worker", _exactly(connection, _NONCE_BYTES)) + mine)
    if not hmac.compare_digest(_exactly(connection, _NONCE_BYTES), _proof(key, b"trainer", mine)):
        raise PermissionError(f"the listener at {address} does not know the key")
    return Channel(connection)


def _proof(key: bytes, side: bytes, nonce: bytes) -> bytes:
    return hmac.new(key, side + nonce, hashlib.sha256).digest()


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the other side has closed the connection")
        data += part
    return data


def _packed(name: str, value: Tensor | SharedBytes) -> tuple[dict[str, Any], bytes | SharedBytes]:
    """Header entry and payload. A large tensor is copied into shared memory here, once."""
    if isinstance(value, SharedBytes):
        num_bytes = value.bytes_B.numel()
        return {"name": name, "dtype": "uint8", "shape": [num_bytes], "is_shared": True}, value
    whole = value.detach().cpu().contiguous()
    entry = {"name": name, "dtype": str(whole.dtype).removeprefix("torch."), "shape": list(whole.shape)}
    flat_B = whole.reshape(-1).view(torch.uint8)
    if flat_B.numel() < SHARED_FROM_BYTES:
        return entry | {"is_shared": False}, flat_B.numpy().tobytes()
    memory = SharedBytes(flat_B.numel())
    memory.bytes_B.copy_(flat_B)
    return entry | {"is_shared": True}, memory


def _unpacked(entries: list[dict[str, Any]], inline: bytes, descriptors: list[int]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset, files = 0, iter(descriptors)
    for entry in entries:
        dtype = getattr(torch, entry["dtype"], None)
        if not isinstance(dtype, torch.dtype) or any(size < 0 for size in entry["shape"]):
            raise ValueError(f"tensor {entry['name']!r} has dtype {entry['dtype']!r} and shape {entry['shape']}")
        num_bytes = dtype.itemsize
        for size in entry["shape"]:
            num_bytes *= size
        if entry["is_shared"]:
            flat_B = _mapped(next(files), num_bytes)
        else:
            if offset + num_bytes > len(inline):
                raise ValueError(f"tensor {entry['name']!r} is longer than its message")
            part = bytearray(inline[offset : offset + num_bytes])
            flat_B = torch.frombuffer(part, dtype=torch.uint8) if part else torch.empty(0, dtype=torch.uint8)
            offset += num_bytes
        tensors[entry["name"]] = flat_B.view(dtype).reshape(entry["shape"])
    return tensors


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """The file's bytes as a tensor that keeps the mapping alive."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if os.fstat(descriptor).st_size < num_bytes:  # reading past the end would be a bus error
        raise ValueError(f"shared memory of {os.fstat(descriptor).st_size} bytes, wanted {num_bytes}")
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
