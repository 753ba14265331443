"""A judge on loopback that misbehaves on demand: a real http.server with real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a handler does with one request: it gets the handler and the prompt.
Behaviour = Callable[["Handler", str], None]


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append({"path": self.path, "headers": dict(self.headers), **body})
            self.server.num_active, self.is_active = self.server.num_active + 1, True
            self.server.max_active = max(self.server.max_active, self.server.num_active)
        try:
            self.server.behaviour_of(number)(self, body["messages"][0]["content"])
        finally:
            self._leave()

    def _leave(self) -> None:
        with self.server.lock:
            self.server.num_active, self.is_active = self.server.num_active - self.is_active, False

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self._leave()  # before the answer is there, on which the client may ask for the next
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class JudgeServer(ThreadingHTTPServer):
    """The last behaviour is repeated for ever."""

    daemon_threads = True
    request_queue_size = 64  # with the usual 5 a burst of connections waits 1 s for its second try

    def __init__(self, behaviours: list[Behaviour]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours = behaviours
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.num_active = self.max_active = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def behaviour_of(self, number: int) -> Behaviour:
        return self.behaviours[min(number, len(self.behaviours) - 1)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


@contextmanager
def serving(*behaviours: Behaviour) -> Iterator[JudgeServer]:
    server = JudgeServer(list(behaviours))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def unused_url() -> str:
    """An address on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def completion(content: object, finish_reason: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]}).encode()


def says(content: object, finish_reason: str = "stop") -> Behaviour:
    return lambda handler, prompt: handler.reply(200, completion(content, finish_reason))


def sends(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    return lambda handler, prompt: handler.reply(status, body, **headers)


def judges_by_words(handler: Handler, prompt: str) -> None:
    """A strict judge: events are sentences, and a description entails those it contains word for word."""
    lines = prompt.splitlines()
    checks = [line.removeprefix("Description: ") for line in lines if line.startswith("Description: ")]
    if checks:
        events = json.loads(next(line.removeprefix("Events: ") for line in lines if line.startswith("Events: ")))
        told = json.loads(checks[0]).casefold()
        verdict: object = {"entailed": [event.casefold().rstrip(".") in told for event in events]}
    else:
        told = json.loads(next(line for line in lines if line.startswith('"')))
        verdict = {"events": [sentence.strip() for sentence in told.split(".") if len(sentence.split()) > 2]}
    handler.reply(200, completion(f"Here it is:\n```json\n{json.dumps(verdict)}\n```"))


def waits(seconds: float, then: Behaviour) -> Behaviour:
    def behave(handler: Handler, prompt: str) -> None:
        time.sleep(seconds)
        then(handler, prompt)

    return behave


def hangs_up(handler: Handler, prompt: str) -> None:
    """Closes without a word."""
    handler.close_connection = True


def closes_halfway(handler: Handler, prompt: str) -> None:
    """Promises a whole answer and sends half of it."""
    body = completion("yes")
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def resets(handler: Handler, prompt: str) -> None:
    """Ends the connection with RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()


def drips_for(seconds: float) -> Behaviour:
    """A byte of the headers every 20 ms, so that no single wait is long; then nothing for 3 s."""

    def behave(handler: Handler, prompt: str) -> None:
        handler.close_connection = True
        end = time.monotonic() + seconds
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while time.monotonic() < end:
                handler.wfile.write(b"y")
                time.sleep(0.02)
        except OSError:  # the client has left
            return
        time.sleep(3.0)

    return behave


drips = drips_for(10.0)


def floods(handler: Handler, prompt: str) -> None:
    """An answer without an end."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * 65536)
    except OSError:
        handler.close_connection = True
