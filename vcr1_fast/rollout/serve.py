"""`vcr1-fast serve CONFIG`: rollout workers on this node, for trainers that run elsewhere.

One address and one worker for each GPU. A worker waits, with SGLang imported, for a trainer that knows the key, serves
it alone, and ends with its connection; a fresh one then waits in its place. So a trainer that is started again, and a
worker that is killed, find each other anew (sgl/remote.py is the trainer's side). What the engine is started with
comes from the trainer; model folder and GPU are this node's.

Who has the key can run code on this node, as the user of this process.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.rollout.addresses import Address, as_setting, is_loopback, read_bind, show
from vcr1_fast.rollout.door import Door, Visitor
from vcr1_fast.rollout.private_folder import PrivateFolder
from vcr1_fast.rollout.rollout_key import read_or_make_key
from vcr1_fast.rollout.sgl.messages import HANDSHAKE_S, Channel
from vcr1_fast.rollout.sgl.process import STOP_WAIT_S, Child, prepare_model_folder
from vcr1_fast.rollout.sgl.tcp import TcpListener
from vcr1_fast.run.hub import with_hub_model
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.run.telemetry import console, say
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.settings.of_model import check_model
from vcr1_fast.types import RunError

POLL_S = 0.25
MAX_BACKOFF_S = 30.0


class Station:
    """One address and the workers behind it, one after the other, in a thread."""

    def __init__(self, listener: TcpListener, key: bytes, child: Child, order: Mapping[str, Any], config: SGLangConfig):
        """`order`: the fields of `serve` in sgl/serving.py."""
        self.address, self.log = listener.address, child.log
        self.facts: Mapping[str, str] = {}  # what the worker says of itself: sglang, torch, gpu
        self.failure = ""  # why this station gave up
        self.is_waiting = threading.Event()  # a worker was once ready for a trainer
        self.num_workers = 0  # that became ready, so far
        self._child, self._order, self._config = child, order, config
        self._door = Door(listener, key, self._say)
        self._stopping = threading.Event()
        self._parent: Channel | None = None
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._door.open()
        self._thread.start()

    def ask_to_stop(self) -> None:
        self._stopping.set()

    def join(self) -> None:
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._serve_one()
        except Exception as error:
            self.failure = str(error) if isinstance(error, RunError | OSError) else f"{type(error).__name__}: {error}"
        finally:
            self._end_worker()
            self._door.close()

    def _serve_one(self) -> None:
        """A worker's life."""
        self._child.start()
        if not self._wait_until_waiting():
            if not self._stopping.is_set():
                self._note_failure()
            return
        self._num_failures = 0
        self.num_workers += 1
        self.is_waiting.set()
        visitor = self._first_visitor()
        if visitor is not None:
            self._hand_over(visitor)
            self._guard(visitor)
            if not self._stopping.is_set():
                self._say(f"trainer {visitor.peer} has left, or the worker has ended; a fresh one starts")
        self._end_worker()

    def _wait_until_waiting(self) -> bool:
        deadline = time.monotonic() + self._config.start_timeout_s
        while self._is_alive() and time.monotonic() < deadline:
            try:
                if self._parent is None:
                    self._parent = self._child.accept(POLL_S)
                    if self._parent is not None:
                        self._parent.send("serve", self._order, timeout_s=HANDSHAKE_S)
                elif select.select([self._parent], [], [], POLL_S)[0]:
                    waiting = self._parent.receive(HANDSHAKE_S)
                    if waiting.kind == "absent":  # the next one would say the same
                        raise RunError(str(waiting.fields["reason"]))
                    self.facts = waiting.fields
                    return waiting.kind == "waiting"
            except (OSError, EOFError, ValueError):
                break
        return False

    def _note_failure(self) -> None:
        words = self._child.last_words()
        self._end_worker()
        self._num_failures += 1
        if self._num_failures > self._config.max_restarts:
            raise RunError(
                f"the worker for {show(self.address)} failed to start {self._num_failures} times in a row "
                f"(rollout.sglang.max_restarts is {self._config.max_restarts}){words}"
            )
        self._say(f"the worker did not start; once more. Its log: {self.log}")
        self._stopping.wait(min(self._config.backoff_s * 2 ** (self._num_failures - 1), MAX_BACKOFF_S))

    def _first_visitor(self) -> Visitor | None:
        while self._is_alive():
            visitor = self._door.next_visitor(POLL_S)
            if visitor is not None:
                return visitor
        return None

    def _hand_over(self, visitor: Visitor) -> None:
        assert self._parent is not None, "a worker waits"
        with contextlib.suppress(OSError):  # it has just ended; the trainer sees its connection close, and comes again
            visitor.channel.send("welcome", timeout_s=HANDSHAKE_S)
            self._parent.send("adopt", visitor.channel.state(), timeout_s=HANDSHAKE_S)
            self._parent.hand_over(visitor.channel.connection, HANDSHAKE_S)
            self._say(f"trainer {visitor.peer} has connected")
        visitor.channel.release()

    def _guard(self, owner: Visitor) -> None:
        """Until the worker ends. Others are told to come later; its own trainer comes back only if it hangs."""
        while self._is_alive():
            visitor = self._door.next_visitor(POLL_S)
            if visitor is None:
                continue
            is_back = visitor.trainer == owner.trainer
            reason = "its last worker is being ended" if is_back else f"it serves the trainer {owner.peer}"
            with contextlib.suppress(OSError):
                visitor.channel.send("busy", {"reason": reason}, timeout_s=HANDSHAKE_S)
            visitor.channel.close()
            if is_back:
                self._say(f"trainer {visitor.peer} is back: its last worker hangs, and is ended")
                return

    def _end_worker(self) -> None:
        """At the end of serve in order, if it listens: SGLang then gives its memory and processes back itself."""
        if self._parent is not None:
            if self._stopping.is_set() and self._is_running():
                with contextlib.suppress(OSError):
                    self._parent.send("close", timeout_s=1.0)
                    self._child.wait(STOP_WAIT_S)
            self._parent.close()
            self._parent = None
        self._child.kill()

    def _is_alive(self) -> bool:
        return not self._stopping.is_set() and self._is_running()

    def _is_running(self) -> bool:
        return self._child.exit_code is None

    def _say(self, what: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {show(self.address)}: {what}")


class Server:
    """The stations of one node. `close` ends all."""

    def __init__(
        self,
        config: SGLangConfig,
        checkpoint: Path,
        *,
        bind: Address,
        gpus: Sequence[int | None],
        key: bytes,
        logs: Path,
    ) -> None:
        """`gpus`: one worker on each; None: on the CPU. Port 0 in `bind` takes free ones, another one is the first's.

        Raises ConfigError when an address cannot be had, OSError when the checkpoint cannot be read or `logs` written.
        """
        self.stations: list[Station] = []
        self._folder = PrivateFolder("vcr1-serve-")
        listeners: list[TcpListener] = []
        try:
            host, port = bind
            logs.mkdir(parents=True, exist_ok=True)
            model = prepare_model_folder(checkpoint, self._folder.path / "model")
            for index in range(len(gpus)):
                listeners.append(_listen((host, port + index if port else 0)))  # noqa: PERF401 - all are closed on errors
            for index, (listener, gpu) in enumerate(zip(listeners, gpus, strict=True)):
                folder = self._folder.path / f"worker-{index}"
                folder.mkdir()
                own = {"model_path": str(model)} | ({} if gpu is None else {"base_gpu_id": gpu})
                child = Child(config.python or sys.executable, folder, logs / f"worker-{index}.log")
                order = {"engine_args": own, "gpu": gpu}
                self.stations.append(Station(listener, key, child, order, config))
        except BaseException:
            for listener in listeners:
                listener.close()
            self._folder.close()
            raise

    def start(self, timeout_s: float) -> None:
        """All workers; waits until each waits for a trainer. Raises RunError, with the end of its log, if one does
        not."""
        for station in self.stations:
            station.start()
        deadline = time.monotonic() + timeout_s
        while not all(station.is_waiting.is_set() for station in self.stations):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"a worker was not ready for trainers within {timeout_s:g} s")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises RunError when a station gave up."""
        for station in self.stations:
            if station.failure:
                raise RunError(station.failure)

    def close(self) -> None:
        """End all workers, and wait for that."""
        for station in self.stations:
            station.ask_to_stop()
        for station in self.stations:
            station.join()
        self._folder.close()


def serve(config: Config, bind: str = "", logs: str = "", num_workers: int | None = None) -> None:
    """Until Ctrl-C or SIGTERM. `bind`: see `addresses.read_bind`; `logs`: folder, by default below train.output_dir;
    `num_workers`: by default one for each GPU, without GPUs rollout.sglang.num_workers.

    Raises ConfigError for settings that cannot work here, OSError, and RunError when a worker does not start.
    """
    try:
        address = read_bind(bind or "127.0.0.1")
    except ValueError as error:
        raise ConfigError(f"--bind: {error}") from None
    settings = config.rollout.sglang
    folder = Path(logs) if logs else Path(config.train.output_dir) / "serve" / socket.gethostname()
    key, place = read_or_make_key(settings.key_file)
    gpus = _gpus(config, num_workers)
    config = with_hub_model(config, SINGLE_PROCESS)
    checkpoint = model_folder(config.model.path)
    read_config(checkpoint)  # its architecture is one that trainers know
    check_model(config)  # and that workers take
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; the workers must not outlive this process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it with & switches it off
    server = Server(settings, checkpoint, bind=address, gpus=gpus, key=key, logs=folder)
    try:
        say(f"starting {len(gpus)} rollout workers for {checkpoint}; logs in {folder}")
        server.start(settings.start_timeout_s)
        _print_table(server, place)
        while True:
            server.check()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say("ending the workers")
    finally:
        server.close()


def _listen(address: Address) -> TcpListener:
    try:
        return TcpListener(address)
    except (OSError, OverflowError) as error:  # the latter for a port above 65535
        raise ConfigError(
            f"cannot listen at {show(address)} ({error}): choose another --bind; each worker takes one port, in order"
        ) from None


def _gpus(config: Config, num_workers: int | None) -> list[int | None]:
    """One entry for each worker: its GPU, or None. Raises ConfigError for more workers than GPUs."""
    import torch

    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--workers is {num_workers}, wanted >= 1")
    if config.model.device == "cpu" or not torch.cuda.is_available():
        if config.model.device == "cuda":
            raise ConfigError("model.device is cuda, but torch sees no GPU here")
        return [None] * (num_workers or config.rollout.sglang.num_workers)
    num_gpus = torch.cuda.device_count()
    if num_workers is not None and num_workers > num_gpus:
        raise ConfigError(f"--workers is {num_workers}, wanted 1 .. {num_gpus}: each needs a GPU of its own")
    return list(range(num_workers or num_gpus))


def _print_table(server: Server, key_place: str) -> None:
    table = Table("worker", "address", "GPU", "SGLang", "torch", "log", box=box.SIMPLE)
    for index, station in enumerate(server.stations):
        facts = station.facts
        texts = (show(station.address), facts["gpu"], facts["sglang"], facts["torch"], str(station.log))
        table.add_row(str(index), *(text.replace("[", r"\[") for text in texts))
    console.print(table)
    host = server.stations[0].address[0]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    written = as_setting([(name, station.address[1]) for station in server.stations])
    say(f"key: {key_place}; a trainer elsewhere needs the same one")
    say(
        "trainer: --rollout.engine=sglang --rollout.sglang.placement=disaggregated "
        f"--rollout.sglang.addresses='{written}'"
    )
    if not is_loopback(host):
        say("what travels is signed, not encrypted: keep these ports inside a private network, or use WireGuard or ssh")
    say("waiting for trainers; Ctrl-C ends all")
