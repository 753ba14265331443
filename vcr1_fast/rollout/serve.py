"""`vcr1-fast serve CONFIG`: rollout workers on this node, for trainers that run elsewhere.

One worker for each GPU, or rollout.sglang.tp_size of them, at an address of its own. A worker waits, with SGLang
imported, for a trainer that knows the key, serves it alone, and ends with its connection (sgl/endpoint.py); a fresh one
then takes its place. So a trainer that is started again, and a worker that is killed, find each other anew. What the
engine is started with comes from the trainer; model folder and GPU are this node's.

Who has the key can run code on this node, as the user of this process.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.rollout.addresses import Address, as_setting, is_loopback, read_bind, show
from vcr1_fast.rollout.rollout_key import read_or_make_key
from vcr1_fast.rollout.sgl.endpoint import NO_SGLANG
from vcr1_fast.rollout.sgl.process import STOP_WAIT_S, Child, prepare_model_folder
from vcr1_fast.run.hub import with_hub_model
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.settings.of_model import check_model
from vcr1_fast.types import RunError

POLL_S = 0.25
SILENCE_S = 60.0  # a worker that shows no life for so long hangs as a whole; loading a library may hold it up, too


class Station:
    """One address and the workers behind it, one after the other."""

    def __init__(self, address: Address, child: Child, config: SGLangConfig) -> None:
        self.address, self.child = address, child
        self.facts: Mapping[str, str] = {}  # what the worker says of itself: sglang, torch, gpu
        self.num_workers = 0  # that were ready for a trainer, so far
        self._config = config
        self._start_at_s = 0.0  # of the next worker
        self._start_by_s = 0.0  # of this one; 0: there is none
        self._trainer: str | None = None  # None: the worker is not ready
        self._num_failures = 0

    @property
    def is_ready(self) -> bool:
        """Whether there is a worker that waits for a trainer, or has one."""
        return self._trainer is not None

    def poll(self) -> None:
        """Look after the worker: start one, say who is served, end one that hangs. Raises RunError when none starts."""
        now_s = time.monotonic()
        if not self._start_by_s:
            if now_s >= self._start_at_s:
                self.child.start()
                self._start_by_s, self._trainer = now_s + self._config.start_timeout_s, None
            return
        status, silence_s = self.child.status()
        if status and self._trainer is None:
            self.facts, self._num_failures, self._trainer = status, 0, ""
            self.num_workers += 1
        if status.get("trainer", "") != (self._trainer or ""):
            self._trainer = status["trainer"]
            self._say(f"trainer {self._trainer} has connected")
        is_silent = silence_s > SILENCE_S
        if self.child.exit_code is None and not is_silent and (self.is_ready or now_s < self._start_by_s):
            return
        self._start_by_s = 0.0
        if self.is_ready:
            why = f"has shown no life for {SILENCE_S:g} s, and is ended" if is_silent else "has ended"
            self._say(f"the worker {why}, its trainer was {self._trainer or 'none'}; a fresh worker starts")
        else:
            self._note_failure()

    def _note_failure(self) -> None:
        if self.child.exit_code == NO_SGLANG:  # the next one would say the same
            raise RunError(self.child.printed().rstrip().rpartition("\n")[2])
        self._num_failures += 1
        if self._num_failures > self._config.max_restarts:
            raise RunError(
                f"the worker for {show(self.address)} failed to start {self._num_failures} times in a row "
                f"(rollout.sglang.max_restarts is {self._config.max_restarts}){self.child.last_words()}"
            )
        self._say(f"the worker did not start; once more. Its log: {self.child.log}")
        self._start_at_s = time.monotonic() + self._config.pause_s(self._num_failures)

    def _say(self, what: str) -> None:
        say(f"{time.strftime('%H:%M:%S')} {show(self.address)}: {what}")


class Server:
    """The stations of one node, and a thread that looks after them. `close` ends all."""

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
        """`gpus`: each worker's first; None: on the CPU. Port 0 in `bind` takes free ones, another one is the first's.

        Raises ConfigError when an address cannot be had, OSError when the checkpoint cannot be read or `logs` written.
        """
        self.stations: list[Station] = []
        self._stopping = threading.Event()
        self._thread, self._failure = threading.Thread(target=self._run, daemon=True), ""
        addresses = _free_addresses(bind, len(gpus))
        self._folder = Path(tempfile.mkdtemp(prefix="vcr1-serve-"))
        try:
            logs.mkdir(parents=True, exist_ok=True)
            model = prepare_model_folder(checkpoint, self._folder / "model")
            for index, (address, gpu) in enumerate(zip(addresses, gpus, strict=True)):
                own = {"model_path": str(model)} | ({} if gpu is None else {"base_gpu_id": gpu})
                own |= {"tp_size": config.tp_size} if config.tp_size > 1 else {}
                folder, log = self._folder / f"worker-{index}", logs / f"worker-{index}.log"
                folder.mkdir()
                child = Child(config.python or sys.executable, folder, log, f"tcp://{show(address)}", key, own)
                self.stations.append(Station(address, child, config))
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def start(self, timeout_s: float) -> None:
        """All workers; waits until each waits for a trainer. Raises RunError, with the end of its log, if one does
        not."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not all(station.num_workers for station in self.stations):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"a worker was not ready for trainers within {timeout_s:g} s")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises RunError when no worker starts at one of the stations."""
        if self._failure:
            raise RunError(self._failure)

    def close(self) -> None:
        """End all workers, and wait for that."""
        self._stopping.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(POLL_S):
                for station in self.stations:
                    station.poll()
        except Exception as error:
            self._failure = str(error) if isinstance(error, RunError | OSError) else f"{type(error).__name__}: {error}"
        finally:
            for station in self.stations:
                station.child.ask_to_end()
            for station in self.stations:
                if station.is_ready:
                    station.child.wait(STOP_WAIT_S)
                station.child.kill()


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
    check_model(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; the workers must not outlive this process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it with & switches it off
    server = Server(settings, checkpoint, bind=address, gpus=gpus, key=key, logs=folder)
    try:
        say(f"starting {len(gpus)} rollout workers for {checkpoint}; logs in {folder}")
        server.start(settings.start_timeout_s)
        _say_where(server, place)
        while True:
            server.check()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say("ending the workers")
    finally:
        server.close()


def _free_addresses(first: Address, count: int) -> list[Address]:
    """Of this machine, one after the other, or with port 0 any. Raises ConfigError; the workers bind them later."""
    host, port = first
    with contextlib.ExitStack() as held:
        found: list[Address] = []
        for index in range(count):
            address = (host, port + index if port else 0)
            try:
                family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
                listener = held.enter_context(socket.create_server(address, family=family))
            except (OSError, OverflowError) as error:  # the latter for a port above 65535
                raise ConfigError(
                    f"cannot listen at {show(address)} ({error}): choose another --bind; each worker takes one port, "
                    "in order"
                ) from None
            found.append(listener.getsockname()[:2])
    return found


def _gpus(config: Config, num_workers: int | None) -> list[int | None]:
    """One entry for each worker: the first of its GPUs, or None. Raises ConfigError for more workers than GPUs."""
    import torch

    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--workers is {num_workers}, wanted >= 1")
    if config.model.device == "cpu" or not torch.cuda.is_available():
        if config.model.device == "cuda":
            raise ConfigError("model.device is cuda, but torch sees no GPU here")
        return [None] * (num_workers or config.rollout.sglang.num_workers)
    num_gpus, tp_size = torch.cuda.device_count(), config.rollout.sglang.tp_size
    most = num_gpus // tp_size
    if not 1 <= (num_workers or 1) <= most:
        raise ConfigError(
            f"--workers is {num_workers or 1} and rollout.sglang.tp_size {tp_size}, but there are {num_gpus} GPUs, and "
            f"each worker needs {tp_size} of its own: wanted at most {most} workers"
        )
    return [tp_size * index for index in range(num_workers or most)]


def _say_where(server: Server, key_place: str) -> None:
    for index, station in enumerate(server.stations):
        facts = station.facts
        say(
            f"worker {index} at {show(station.address)}: GPU {facts['gpu']}, SGLang {facts['sglang']}, torch "
            f"{facts['torch']}; log {station.child.log}"
        )
    host = server.stations[0].address[0]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    written = as_setting(name, [station.address[1] for station in server.stations])
    say(f"key: {key_place}; a trainer elsewhere needs the same one")
    say(
        "trainer: --rollout.engine=sglang --rollout.sglang.placement=disaggregated "
        f"--rollout.sglang.addresses='{written}'"
    )
    if not is_loopback(host):
        say("the weights of a broadcast travel in the clear: keep both nodes inside a private network")
    say("waiting for trainers; Ctrl-C ends all")
