"""Messages between the trainer and a rollout worker on the same machine: a JSON header and named tensors, no pickle.

A message is a preamble, the header, and the bytes of its small tensors, over a Unix socket. Tensors from 64 KiB on
(pixels, weights) do not go through the socket: they lie in anonymous memory (memfd) whose descriptor is passed along,
so that nothing is copied twice, nothing has a name that could be left behind, and the size of /dev/shm does not matter.
Between machines the same messages go through TCP (tcp.py).

A socket and not a message queue, because the end of a killed process is then seen at once, as the end of the stream.
Runs in the trainer and in the worker's interpreter: only the standard library, numpy and torch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.handshake import KEY_BYTES, greet, introduce

KEY_VARIABLE = "VCR1_WORKER_KEY"  # environment variable of the worker that holds the key, hexadecimal
SHARED_FROM_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 24
MAX_INLINE_BYTES = 1 << 28
MAX_DIMENSIONS = 8  # of a tensor; pixels of a clip have 5
MAX_FILES = 64  # Linux passes at most 253 descriptors at once
STALL_S = 60.0  # a peer that says nothing for so long in the middle of a message is taken for dead
HANDSHAKE_S = 10.0  # a stranger that says nothing must not hold the run up
_PREAMBLE = struct.Struct("<4sIII")  # magic, bytes of the header, bytes of inline tensors, descriptors
_MAGIC = b"vcr1"


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
        connection.setblocking(False)  # time limits belong to a call, not to the socket that two threads share
        self._socket = connection
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    @property
    def is_closed(self) -> bool:
        """Whether the other side is known to be gone; takes nothing of what it sent."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

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
        header = header_bytes(kind, fields, entries)
        body = b"".join([header, *inline])
        if len(body) - len(header) > MAX_INLINE_BYTES or len(shared) > MAX_FILES:
            raise ValueError(f"message {kind!r} is too large: {len(body)} bytes and {len(shared)} large tensors")
        preamble = _PREAMBLE.pack(_MAGIC, len(header), len(body) - len(header), len(shared))
        descriptors, deadline = [memory.descriptor for memory in shared], deadline_of(timeout_s)
        with self._send_lock:
            self._pass(preamble, descriptors, deadline)
            self._write(body, deadline)

    def receive(self, timeout_s: float | None = None) -> Message:
        """Raises TimeoutError, EOFError when the other side is gone, ValueError for bytes that are no message."""
        deadline = deadline_of(timeout_s)
        preamble, descriptors = self._take(_PREAMBLE.size, deadline)
        try:
            preamble += self._read(_PREAMBLE.size - len(preamble), deadline)
            magic, num_header, num_inline, num_files = _PREAMBLE.unpack(preamble)
            is_sane = num_header <= MAX_HEADER_BYTES and num_inline <= MAX_INLINE_BYTES
            if magic != _MAGIC or not is_sane or num_files != len(descriptors):
                raise ValueError(f"got {preamble[:4]!r} and {len(descriptors)} descriptors, wanted a message")
            kind, fields, entries = parse_header(self._read(num_header, deadline))
            return Message(kind, fields, _unpacked(entries, self._read(num_inline, deadline), descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def hand_over(self, connection: socket.socket, timeout_s: float) -> None:
        """Give the process at the other end a connection of this one; it calls `take_over`."""
        with self._send_lock:
            self._pass(b"c", [connection.fileno()], deadline_of(timeout_s))

    def take_over(self, timeout_s: float) -> socket.socket:
        """Raises ValueError when something else came than a connection; otherwise as `receive`."""
        _, descriptors = self._take(1, deadline_of(timeout_s))
        if len(descriptors) != 1:
            raise ValueError(f"got {len(descriptors)} descriptors, wanted one connection")
        return socket.socket(fileno=descriptors[0])

    def close(self) -> None:
        """Also wakes a thread that waits in `receive`; it gets EOFError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _pass(self, data: bytes, descriptors: list[int], deadline: float | None) -> None:
        while True:
            try:
                sent = socket.send_fds(self._socket, [data], descriptors)
                break
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
        self._write(data[sent:], deadline)

    def _take(self, num_bytes: int, deadline: float | None) -> tuple[bytes, list[int]]:
        """The first bytes of a message, at most so many, and the descriptors that came with them."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, num_bytes, MAX_FILES)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise EOFError("the other side is gone") from error
            for descriptor in descriptors:  # recv_fds leaves them open for programs that are started: one of torch's
                os.set_inheritable(descriptor, False)  # kept a killed worker's connection for 2 s
            if not data:
                raise EOFError("the other side has closed the connection")
            return data, descriptors

    def _write(self, data: bytes | memoryview, deadline: float | None) -> None:
        view = memoryview(data)
        while view.nbytes:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def _read(self, num_bytes: int, deadline: float | None) -> bytes:
        buffer = bytearray(num_bytes)
        self._fill(memoryview(buffer), deadline)
        return bytes(buffer)

    def _fill(self, view: memoryview, deadline: float | None) -> None:
        """The rest of a message that has begun: also without a deadline, no part of it may take STALL_S."""
        while view.nbytes:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                stalled = time.monotonic() + STALL_S
                self._wait(select.POLLIN, stalled if deadline is None else min(deadline, stalled))
                continue
            except OSError as error:
                raise EOFError("the other side is gone") from error
            if count == 0:
                raise EOFError("the other side went away in the middle of a message")
            view = view[count:]

    def _wait(self, event: int, deadline: float | None) -> None:
        """Raises TimeoutError at the deadline (of `time.monotonic`)."""
        remaining_s = None if deadline is None else deadline - time.monotonic()
        if self._socket.fileno() < 0:
            raise ConnectionError("the connection was closed on this side")
        poller = select.poll()
        poller.register(self._socket, event)
        if remaining_s is not None and (remaining_s <= 0 or not poller.poll(1000 * remaining_s)):
            raise TimeoutError("the other side did not take a message in time, or send one")
        if remaining_s is None:
            poller.poll()


class Listener:
    """Where one worker connects to: a socket in a folder that only this user can enter, and a random key."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / f"worker-{secrets.token_hex(4)}.sock")
        self.key = secrets.token_bytes(KEY_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short_path(self.address) as path:
            self._socket.bind(path)
        self._socket.listen(4)

    def accept(self, timeout_s: float) -> Channel | None:
        """The channel to a peer that knows the key; None when none came in time, or one without the key."""
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        try:
            greet(connection, self.key, HANDSHAKE_S)
        except (OSError, EOFError):
            connection.close()
            return None
        return Channel(connection)

    def close(self) -> None:
        self._socket.close()
        Path(self.address).unlink(missing_ok=True)


def connect(address: str, key: bytes) -> Channel:
    """The worker's side of `Listener.accept`. Raises OSError or EOFError; PermissionError when the key is another."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(address) as path:
        connection.connect(path)
    introduce(connection, key, STALL_S)
    return Channel(connection)


@contextlib.contextmanager
def _short_path(address: str) -> Iterator[str]:
    """The same socket under a name that fits into the 107 bytes of an address, however long the folder's is."""
    path = Path(address)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def deadline_of(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def header_bytes(kind: str, fields: Mapping[str, Any] | None, entries: list[dict[str, Any]]) -> bytes:
    """Raises ValueError when it is longer than a receiver takes."""
    header = json.dumps({"kind": kind, "fields": fields or {}, "tensors": entries}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"the header of message {kind!r} has {len(header)} bytes, wanted <= {MAX_HEADER_BYTES}")
    return header


def parse_header(data: bytes) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Kind, fields and entries of the tensors. Raises ValueError for anything else."""
    try:
        header = json.loads(data)
        kind, fields, entries = header["kind"], header["fields"], header["tensors"]
    except (TypeError, LookupError, RecursionError):
        raise ValueError(f"got the header {data[:80]!r}, wanted kind, fields and tensors") from None
    if not (isinstance(kind, str) and isinstance(fields, dict) and isinstance(entries, list)):
        raise ValueError(f"got the header {data[:80]!r}, wanted a text, an object and a list")
    return kind, fields, entries


def tensor_entry(name: str, value: Tensor) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def tensor_layout(entry: Any) -> tuple[torch.dtype, int]:
    """Data type and bytes of the tensor that an entry describes. Raises ValueError when it describes none."""
    try:
        name, dtype, shape = entry["name"], getattr(torch, entry["dtype"], None), entry["shape"]
        is_shape = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
    except (TypeError, LookupError):
        raise ValueError(f"got {entry!r:.80}, wanted a tensor's name, dtype and shape") from None
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or not is_shape or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r:.80} has dtype {entry['dtype']!r:.80} and shape {shape!r:.80}")
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return dtype, num_bytes


def shaped(flat_B: Tensor, entry: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The tensor that an entry describes, of its bytes. Raises ValueError for one that torch cannot have."""
    try:
        return flat_B.view(dtype).reshape(entry["shape"])
    except (RuntimeError, TypeError, OverflowError) as error:  # a quantised type, [0, 2**39, 2**39]
        raise ValueError(f"tensor {entry['name']!r:.80}: {error}") from None


def flat_bytes(value: Tensor) -> Tensor:
    """[num_bytes] uint8 on the CPU; shares the memory of a tensor that lies there in one piece."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _packed(name: str, value: Tensor | SharedBytes) -> tuple[dict[str, Any], bytes | SharedBytes]:
    """Header entry and payload. A large tensor is copied into shared memory here, once."""
    if isinstance(value, SharedBytes):
        return tensor_entry(name, value.bytes_B) | {"is_shared": True}, value
    flat_B = flat_bytes(value)
    if flat_B.numel() < SHARED_FROM_BYTES:
        return tensor_entry(name, value) | {"is_shared": False}, flat_B.numpy().tobytes()
    memory = SharedBytes(flat_B.numel())
    memory.bytes_B.copy_(flat_B)
    return tensor_entry(name, value) | {"is_shared": True}, memory


def _unpacked(entries: list[dict[str, Any]], inline: bytes, descriptors: list[int]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset, files = 0, iter(descriptors)
    for entry in entries:
        dtype, num_bytes = tensor_layout(entry)
        if entry.get("is_shared"):
            descriptor = next(files, None)
            if descriptor is None:
                raise ValueError(f"tensor {entry['name']!r} came without its memory")
            flat_B = _mapped(descriptor, num_bytes)
        else:
            if offset + num_bytes > len(inline):
                raise ValueError(f"tensor {entry['name']!r} is longer than its message")
            part = bytearray(inline[offset : offset + num_bytes])
            flat_B = torch.frombuffer(part, dtype=torch.uint8) if part else torch.empty(0, dtype=torch.uint8)
            offset += num_bytes
        tensors[entry["name"]] = shaped(flat_B, entry, dtype)
    return tensors


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """The file's bytes as a tensor that keeps the mapping alive."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if os.fstat(descriptor).st_size < num_bytes:  # reading past the end would be a bus error
        raise ValueError(f"shared memory of {os.fstat(descriptor).st_size} bytes, wanted {num_bytes}")
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
