"""Who comes in to a rollout worker: connections in, trainers with the right key and version out (to serve.py).

Each connection is heard in a thread of its own and for a limited time, so that one that says nothing, or says something
hostile, holds up and ends nobody but itself.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vcr1_fast import __version__
from vcr1_fast.rollout.addresses import Address, show
from vcr1_fast.rollout.sgl.messages import HANDSHAKE_S
from vcr1_fast.rollout.sgl.tcp import TcpChannel, TcpListener, greeted

POLL_S = 0.25
MAX_HEARD = 64  # at once; a trainer is heard within milliseconds
MAX_REASON_LETTERS = 300  # of what a stranger may put into our log


@dataclass(frozen=True, slots=True)
class Visitor:
    """A trainer at the door, with the right key and version."""

    channel: TcpChannel
    trainer: str  # random name of its link
    peer: str


class Door:
    """One address. `close` sends away whoever is still at it."""

    def __init__(self, listener: TcpListener, key: bytes, say: Callable[[str], None]) -> None:
        """`say`: for those that are sent away; called by several threads."""
        self._listener, self._key, self._say = listener, key, say
        self._visitors: queue.SimpleQueue[Visitor] = queue.SimpleQueue()
        self._heard: dict[socket.socket, None] = {}  # the oldest first
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive_all, daemon=True)

    def open(self) -> None:
        """From now on; connections that came before have waited."""
        self._thread.start()

    def next_visitor(self, wait_s: float) -> Visitor | None:
        """The next one that is still there; None when there is none in time."""
        try:
            visitor = self._visitors.get(timeout=wait_s)
        except queue.Empty:
            return None
        if not visitor.channel.is_closed:
            return visitor
        visitor.channel.close()  # it gave up while no worker was free
        return None

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        self._thread.join()
        with self._lock:
            for connection in self._heard:
                _end(connection)
        while not self._visitors.empty():
            self._visitors.get().channel.close()

    def _receive_all(self) -> None:
        while not self._closing.is_set():
            try:
                found = self._listener.accept(POLL_S)
            except OSError as error:  # it left already, or this process has no descriptor left
                if not self._closing.wait(POLL_S):
                    self._say(f"cannot take a connection: {error}")
                continue
            if found is None:
                continue
            with self._lock:
                if len(self._heard) >= MAX_HEARD:  # many that say nothing: the one that has said nothing for longest
                    _end(next(iter(self._heard)))
                self._heard[found[0]] = None
            threading.Thread(target=self._hear, args=found, daemon=True).start()

    def _hear(self, connection: socket.socket, peer: Address) -> None:
        """Whatever is raised here is about this connection alone."""
        try:
            visitor = self._heard_out(connection, peer)
        except Exception as error:
            connection.close()
            if not self._closing.is_set():
                reason = " ".join(f"{error or type(error).__name__}".split())[:MAX_REASON_LETTERS]
                self._say(f"sent {show(peer)} away: {reason}")
        else:
            self._visitors.put(visitor)
        finally:
            with self._lock:
                self._heard.pop(connection, None)

    def _heard_out(self, connection: socket.socket, peer: Address) -> Visitor:
        channel = greeted(connection, self._key)
        hello = channel.receive(HANDSHAKE_S)
        if hello.kind != "hello" or not {"package", "trainer"} <= set(hello.fields):
            raise ValueError(
                f"it began with {hello.kind!r} and {sorted(hello.fields)}, wanted hello, package and trainer"
            )
        if hello.fields["package"] != __version__:
            reason = f"vcr1-fast is {__version__} there and {hello.fields['package']} here: install the same one"
            channel.send("unfit", {"reason": reason}, timeout_s=HANDSHAKE_S)
            raise ValueError(reason)
        return Visitor(channel, str(hello.fields["trainer"]), show(peer))


def _end(connection: socket.socket) -> None:
    """The thread that hears it sees the end; the socket is that thread's to close."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
