"""Both ends of a new connection prove to each other that they hold the same key, before anything else is read.

    listener  -> connector   greeting, nonce_l
    connector -> listener    HMAC(key, "connector", nonce_l, nonce_c), nonce_c
    listener  -> connector   HMAC(key, "listener", nonce_l, nonce_c), or 32 zero bytes: another key

HMAC is RFC 2104 with SHA-256. The nonces are random, so that nothing recorded earlier is of use; the name of a side is
in each proof, so that none can be sent back to who made it. From key and nonces follow two keys for this connection
alone, one for each direction (tcp.py signs with them).

Runs in the trainer, in `vcr1-fast serve` and in the worker's interpreter: only the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time
from dataclasses import dataclass

KEY_BYTES = 32
GREETING = b"vcr1-fast 3\n"  # the number goes up when messages change their form
_REFUSED = bytes(hashlib.sha256().digest_size)


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """Of one side of one connection."""

    send: bytes
    receive: bytes


def greet(connection: socket.socket, key: bytes, timeout_s: float) -> SessionKeys:
    """The listener's side. Raises PermissionError when the peer has another key, OSError or EOFError when it leaves or
    takes longer than `timeout_s` in all; the connection is then to be closed."""
    deadline = time.monotonic() + timeout_s
    theirs_first = secrets.token_bytes(KEY_BYTES)
    connection.settimeout(timeout_s)
    connection.sendall(GREETING + theirs_first)
    answer = _exactly(connection, 2 * KEY_BYTES, deadline)
    proof, nonces = answer[:KEY_BYTES], theirs_first + answer[KEY_BYTES:]
    if not hmac.compare_digest(proof, _keyed(key, b"connector", nonces)):
        connection.sendall(_REFUSED)
        raise PermissionError("a peer with another key, or none, was turned away")
    connection.sendall(_keyed(key, b"listener", nonces))
    return SessionKeys(_keyed(key, b"from listener", nonces), _keyed(key, b"from connector", nonces))


def introduce(connection: socket.socket, key: bytes, timeout_s: float) -> SessionKeys:
    """The connector's side. Raises PermissionError when the listener has another key, ValueError when it is something
    else than a rollout worker, OSError or EOFError when it leaves or takes longer than `timeout_s` in all."""
    deadline = time.monotonic() + timeout_s
    greeting = _exactly(connection, len(GREETING), deadline)
    if greeting != GREETING:
        raise ValueError(
            f"it greets with {greeting!r}, wanted {GREETING!r}: another program, or another version of vcr1-fast"
        )
    nonces = _exactly(connection, KEY_BYTES, deadline) + secrets.token_bytes(KEY_BYTES)
    connection.sendall(_keyed(key, b"connector", nonces) + nonces[KEY_BYTES:])
    proof = _exactly(connection, KEY_BYTES, deadline)
    if proof == _REFUSED:
        raise PermissionError("it has another key than we have")
    if not hmac.compare_digest(proof, _keyed(key, b"listener", nonces)):
        raise PermissionError("it does not know the key that it wants us to know")
    return SessionKeys(_keyed(key, b"from connector", nonces), _keyed(key, b"from listener", nonces))


def _keyed(key: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, role + nonces, "sha256")


def _exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        connection.settimeout(max(0.001, deadline - time.monotonic()))  # all of it, not each part, is limited
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the other side has closed the connection")
        data += part
    return data
