"""One HTTP request: a JSON body out, status, headers and a bounded body back, all before one deadline.

Uses the standard library: the judge is the only thing here that speaks HTTP, and urllib has no deadline for a server
that sends one byte a minute. Called by client.py.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_REPLY_BYTES = 1 << 20  # an answer of 4,096 tokens is about 20 kB


class TransportError(Exception):
    """No complete reply: refused, reset, cut off, too long, or too late. Worth another attempt."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server sent."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # at most MAX_REPLY_BYTES


def post_json(url: str, payload: object, headers: Mapping[str, str], timeout_s: float) -> Reply:
    """POST `payload` as JSON. Redirects are not followed: they would hand the key to another server.

    A connection of its own: the set-up costs milliseconds, an answer seconds, and none goes stale. Proxies are those
    of the environment (without password); a server on this machine is reached directly.
    Raises TransportError when there is no complete reply after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    parts = urllib.parse.urlsplit(url)
    connection, target = _connection(parts, timeout_s)
    raw: socket.socket | None = None
    try:
        connection.connect()
        raw = connection.sock
        assert raw is not None
        connection.sock = _DeadlineSocket(raw, deadline)
        body = json.dumps(payload).encode()
        sent = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close", **headers}
        connection.request("POST", target, body, sent)
        response = connection.getresponse()
        content = response.read(MAX_REPLY_BYTES + 1)
        if len(content) > MAX_REPLY_BYTES:
            raise TransportError(f"the reply is longer than {MAX_REPLY_BYTES} bytes")
        if response.length:  # a read of a bounded size comes back short, without an error, when the server hangs up
            raise TransportError(f"the connection closed {response.length} bytes before the end of the reply")
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, content)
    except TimeoutError as error:
        raise TransportError(f"no complete reply after {timeout_s:.3g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
        if raw is not None:
            raw.close()


def _connection(parts: urllib.parse.SplitResult, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """An unopened connection to the server or to its proxy, and the request target."""
    host, is_secure = parts.hostname or "", parts.scheme == "https"
    target = urllib.parse.urlunsplit(("", "", parts.path, parts.query, "")) or "/"
    is_direct = _is_loopback(host) or bool(urllib.request.proxy_bypass(host))
    proxy = None if is_direct else urllib.request.getproxies().get(parts.scheme)
    if not proxy:
        return _open(is_secure, host, parts.port, timeout_s), target
    proxy_parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    proxy_host, proxy_port = proxy_parts.hostname or "", proxy_parts.port
    if not is_secure:
        return http.client.HTTPConnection(proxy_host, proxy_port, timeout=timeout_s), urllib.parse.urlunsplit(parts)
    connection = _open(True, proxy_host, proxy_port or 80, timeout_s)
    connection.set_tunnel(host, parts.port)
    return connection, target


def _open(is_secure: bool, host: str, port: int | None, timeout_s: float) -> http.client.HTTPConnection:
    if is_secure:
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_tls_context())
    return http.client.HTTPConnection(host, port, timeout=timeout_s)


@lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads some 150 certificates: once is enough


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _DeadlineSocket:
    """The part of a socket that http.client uses, each wait shortened to what is left until the deadline.

    A plain time-out starts anew with every byte that comes. close() does nothing: http.client calls it before the body
    is read; the owner closes the socket behind it.
    """

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def _limit(self) -> socket.socket:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._raw.settimeout(left_s)
        return self._raw

    def sendall(self, data: Any) -> None:
        self._limit().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_SocketReader(self))

    def recv_into(self, buffer: Any) -> int:
        return self._limit().recv_into(buffer)

    def close(self) -> None:
        pass


class _SocketReader(io.RawIOBase):
    def __init__(self, source: _DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.recv_into(buffer)
