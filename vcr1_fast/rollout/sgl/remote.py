"""A rollout worker on another machine, run by `vcr1-fast serve` (serve.py) and reached by TCP, from the trainer's side.

    trainer -> serve     hello {trainer, package}
    serve   -> trainer   welcome {} | busy {reason} | unfit {reason}
    then, with the worker itself, what worker.py lists

`trainer` is a random name of this link. A link that comes back while its old worker still hangs is known by it, and the
old worker is ended: over TCP nobody here could kill it.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vcr1_kernels.reference import CLIP_MEAN, CLIP_STD

from vcr1_fast import __version__
from vcr1_fast.rollout.addresses import Address, show
from vcr1_fast.rollout.sgl.link import WorkerGoneError, WorkerLink
from vcr1_fast.rollout.sgl.messages import Channel, Message, SharedBytes
from vcr1_fast.rollout.sgl.pixels import pack
from vcr1_fast.rollout.sgl.tcp import connect_tcp

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # between two tries to connect
GREETING_WAIT_S = 120.0  # a worker's node accepts at once, and greets when it has a fresh worker: 10 to 60 s


class RemoteWorker(WorkerLink):
    """`start` connects, `kill` and `stop` disconnect: the worker then ends, and a fresh one waits in its place."""

    def __init__(self, address: Address, key: bytes, engine_args: Mapping[str, Any]) -> None:
        super().__init__(show(address))
        self._address, self._key, self._engine_args = address, key, engine_args
        self._trainer = secrets.token_hex(8)
        self._levels_C256 = byte_levels()
        self._attempt: _Attempt | None = None

    def start(self) -> None:
        """In a thread of its own, so that many workers start together."""
        self.kill()
        self.num_starts += 1
        self._attempt = _Attempt(self._address, self._key, self._trainer)

    def wait_ready(self, timeout_s: float) -> None:
        assert self._attempt is not None, "start it first"
        deadline = time.monotonic() + timeout_s
        channel = self._attempt.wait(timeout_s)
        if channel is None:
            raise self._gone(f"could not be reached within {timeout_s:g} s: {self._attempt.reason}")
        self._begin_engine(channel, self._engine_args, max(1.0, deadline - time.monotonic()))

    def kill(self) -> None:
        if self._attempt is not None:
            self._attempt.give_up()
            self._attempt = None
        self._drop_channel()

    def stop(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send("close", timeout_s=1.0)
        self.kill()

    def post(self, fields: Mapping[str, Any], tensors: Mapping[str, Any], timeout_s: float) -> None:
        """As `WorkerLink.post`; pixels go as bytes where that is exact."""
        self.channel.send("generate", fields, pack(tensors, self._levels_C256), timeout_s=timeout_s)

    def ask(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], timeout_s: float) -> Message:
        """As `WorkerLink.ask`. Of shared memory, a bucket of weights, only what its entries name is sent."""
        stop = max((int(entry["stop"]) for entry in fields.get("entries", ())), default=None)
        sent = {
            name: value.bytes_B[:stop] if isinstance(value, SharedBytes) else value for name, value in tensors.items()
        }
        return super().ask(kind, fields, sent, timeout_s)

    def _gone(self, what: str) -> WorkerGoneError:
        self.kill()
        return WorkerGoneError(f"{what}. It runs at {self.name}: `vcr1-fast serve` has its log there")


class _Attempt:
    """Tries to get a channel, until it has one, is given up, or knows that it cannot work."""

    def __init__(self, address: Address, key: bytes, trainer: str) -> None:
        self.reason = "no answer"  # of the last failure
        self._address, self._key, self._trainer = address, key, trainer
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._done = threading.Event()
        threading.Thread(target=self._try_often, daemon=True).start()

    def wait(self, timeout_s: float) -> Channel | None:
        self._done.wait(timeout_s)
        with self._lock:
            channel, self._channel = self._channel, None
        return channel

    def give_up(self) -> None:
        self._given_up.set()
        channel = self.wait(0.0)
        if channel is not None:
            channel.close()

    def _try_often(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._given_up.is_set():
            try:
                channel = self._try_once()
            except (PermissionError, ValueError) as error:  # the same next time
                self.reason = str(error)
                break
            except (OSError, EOFError) as error:
                self.reason = f"{error}; is `vcr1-fast serve` running there?"
                self._given_up.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            with self._lock:
                if not self._given_up.is_set():
                    self._channel = channel
                    break
            channel.close()
        self._done.set()

    def _try_once(self) -> Channel:
        channel = connect_tcp(self._address, self._key, GREETING_WAIT_S)
        try:
            channel.send("hello", {"trainer": self._trainer, "package": __version__}, timeout_s=GREETING_WAIT_S)
            answer = channel.receive(GREETING_WAIT_S)
            if answer.kind == "welcome":
                return channel
            reason = str(answer.fields.get("reason", answer.kind))
            raise ConnectionError(reason) if answer.kind == "busy" else ValueError(reason)
        except BaseException:
            channel.close()
            raise


def byte_levels() -> Tensor:
    """[3, 256] float32: what `vcr1_kernels.patchify` makes of each byte, by channel, before it rounds to its dtype.

    Its formula, (byte - 255 * mean) / (255 * std) in float32; where it gave other values, nothing would be packed.
    """
    mean_3, std_3 = torch.tensor(CLIP_MEAN) * 255.0, torch.tensor(CLIP_STD) * 255.0
    return (torch.arange(256.0) - mean_3[:, None]) / std_3[:, None]
