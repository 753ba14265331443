"""The worker processes of one engine: started together, fed the same weights, started again when one is gone."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.addresses import read_addresses, show
from vcr1_fast.rollout.rollout_key import KEY_BYTES, read_key
from vcr1_fast.rollout.sgl.delivery import make_delivery
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.link import WorkerGoneError, WorkerLink
from vcr1_fast.rollout.sgl.process import Child
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import Completion, Prompt, RunError

MEMORY_TAGS = ["weights", "kv_cache", "cuda_graph"]


@dataclass
class Request:
    """A prompt and what is wanted of it."""

    index: int  # among those of a `generate` call
    prompt: Prompt
    begun: Sequence[Completion]  # completions to be gone on with, or drawn from their first token
    num_attempts: int = 0
    deadline: float = 0.0


@dataclass
class Seat:
    """One worker and the requests it has."""

    worker: WorkerLink
    requests: dict[int, Request] = field(default_factory=dict)  # by number
    is_checked: bool = False  # it has all weights, and its checksums were compared since it was started
    group: str = ""  # that it is in for the broadcast of weights
    is_released: bool = False  # its memory is lent to the learner


class Workers:
    """See the module's docstring. `policy_version` is of the weights that the workers hold."""

    def __init__(
        self,
        config: SGLangConfig,
        engine_args: Mapping[str, Any],
        folder: Path,
        dtype: torch.dtype,
    ) -> None:
        """Starts them and waits. `folder`: private, for sockets and logs; `dtype`: that floating weights are sent in.

        Raises OSError when the interpreter cannot be run, and RuntimeError, with the end of the worker's log, when
        SGLang does not start.
        """
        self.policy_version = 0
        self.num_restarts = 0
        self._config = config
        self._table = WeightTable()
        self._delivery = make_delivery(config, dtype, torch.device(str(engine_args["device"])))
        self._next_number = 0
        self._failures_in_a_row = 0
        self.seats = [Seat(worker) for worker in make_workers(config, engine_args, folder)]
        try:
            for seat in self.seats:
                seat.worker.start()
            # Elsewhere all at once; here one engine after the other, as each measures what is free
            with ThreadPoolExecutor(1 if config.placement == "colocated" else len(self.seats)) as pool:
                list(pool.map(lambda seat: seat.worker.wait_ready(config.start_timeout_s), self.seats))
        except WorkerGoneError as error:
            self.close()
            raise RunError(f"SGLang does not start: its worker {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def has_weights(self) -> bool:
        """False before the first whole load, and after one that broke off."""
        return self._table.is_whole

    @property
    def host_copy(self) -> HostCopy:
        """Of the weights; ranks that push together share it (run/weight_sync.py)."""
        return self._delivery.copy

    @property
    def is_released(self) -> bool:
        """Whether memory is lent to the learner."""
        return any(seat.is_released for seat in self.seats)

    def next_number(self) -> int:
        """Of a message that wants an answer; never given twice."""
        self._next_number += 1
        return self._next_number

    def load(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """See `RolloutEngine.load_weights`. Takes back memory that was released."""
        self._replace_ended()
        previous, self.policy_version = self.policy_version, policy_version
        try:
            with self._feed(self.seats) as feed:
                self._resume(feed, ["weights"])
                self._delivery.push(self._table.checked(weights), feed, self.seats)
                self._resume(feed, ["cuda_graph", "kv_cache"])
            for index, reason in feed.lost.items():
                self._failures_in_a_row = 0  # of this load; several workers may be lost at once
                if self.host_copy.awaits_others:  # it is found when it is used next
                    print(f"SGLang worker {self.seats[index].worker.name} is lost: it {reason}", file=sys.stderr)
                else:
                    self.revive(self.seats[index], reason)
        except BaseException:
            self.policy_version = previous
            self._table.forget()  # its last bucket may have failed, when every weight had come
            raise
        for seat in self.seats:
            seat.is_released = False

    def release_memory(self) -> None:
        """Lend the workers' GPU memory to the learner until the next load, which must name every weight."""
        with self._feed(self.seats) as feed:
            feed.ask("memory", lambda _: {"action": "release", "tags": MEMORY_TAGS})
            feed.finish()
        self._table.forget()
        for seat in self.seats:
            seat.is_released = True  # one that is lost here is found out, and started again, by the load

    def note_success(self) -> None:
        """A worker answered: failures are counted anew."""
        self._failures_in_a_row = 0

    def revive(self, seat: Seat, reason: str) -> list[Request]:
        """Start the worker again, with the current weights, and give back the requests that it had.

        Raises RunError after `max_restarts` starts in a row without one answer.
        """
        lost = list(seat.requests.values())
        seat.requests.clear()
        while True:
            self._failures_in_a_row += 1
            if self._failures_in_a_row > self._config.max_restarts:
                seat.worker.kill()
                raise RunError(
                    f"SGLang workers failed {self._failures_in_a_row} times in a row (rollout.sglang.max_restarts is "
                    f"{self._config.max_restarts}), the last one because it {reason}"
                )
            print(f"SGLang worker {seat.worker.name} is started again: it {reason}", file=sys.stderr)
            time.sleep(self._config.pause_s(self._failures_in_a_row))
            self.num_restarts += 1
            seat.is_checked, seat.is_released, seat.group = False, False, ""
            try:
                seat.worker.start()
                seat.worker.wait_ready(self._config.start_timeout_s)
                self._refeed(seat)
                return lost
            except WorkerGoneError as error:
                reason = str(error)

    def close(self) -> None:
        """End the workers and free the memory."""
        for seat in self.seats:
            seat.worker.stop()
        self._delivery.close()

    def _feed(self, seats: Sequence[Seat]) -> Feed:
        return Feed(seats, self.next_number, self.policy_version, self._config.timeout_s)

    def _replace_ended(self) -> None:
        """Start again what died while it had nothing to do: found out by a broadcast, it would cost all the others."""
        if self._table.is_whole and not self.host_copy.awaits_others:  # else the load finds them: nothing to feed them
            for seat in self.seats:
                if seat.worker.has_ended:
                    self._failures_in_a_row = 0
                    self.revive(seat, "is gone")

    def _resume(self, feed: Feed, tags: list[str]) -> None:
        if self.is_released:
            feed.ask("memory", lambda _: {"action": "resume", "tags": tags})
            feed.finish()

    def _refeed(self, seat: Seat) -> None:
        """Raises WorkerGoneError when the worker must be started again, RuntimeError when there are no whole weights
        or it holds others."""
        if not self._table.is_whole:
            raise RuntimeError("the engine has no whole set of weights: load_weights must give every weight first")
        with self._feed([seat]) as feed:
            self._delivery.refeed(feed)
        if feed.lost:
            raise WorkerGoneError(feed.lost[0])


def make_workers(config: SGLangConfig, engine_args: Mapping[str, Any], folder: Path) -> list[WorkerLink]:
    """Not started yet: children of this process, or those at `config.addresses`, which are then of this rank alone.

    Raises ConfigError when these need a key and there is none.
    """
    if config.placement == "disaggregated":
        key = read_key(config.key_file)
        shown = [show(address) for address in read_addresses(config.addresses)]
        return [WorkerLink(name, f"tcp://{name}", key, engine_args) for name in shown]
    links: list[WorkerLink] = []
    for name in (f"worker-{index}" for index in range(config.num_workers)):
        address, key = f"ipc://{folder / name}.sock", secrets.token_bytes(KEY_BYTES)
        child = Child(config.python or sys.executable, folder, folder / f"{name}.log", address, key)
        links.append(WorkerLink(name, address, key, engine_args, child))
    return links
