"""The worker processes of one engine: started together, fed the same weights, started again when one is gone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.config_learning import SGLangConfig
from vcr1_fast.rollout.sglang_process import WorkerGoneError, WorkerProcess
from vcr1_fast.rollout.sglang_weights import Batch, WeightStore
from vcr1_fast.types import Prompt

MAX_BACKOFF_S = 30.0


@dataclass
class Request:
    """One prompt of a `generate` call."""

    index: int
    prompt: Prompt
    num_attempts: int = 0
    deadline: float = 0.0
    is_aborted: bool = False


@dataclass
class Seat:
    """One worker and the requests it has."""

    worker: WorkerProcess
    requests: dict[int, Request] = field(default_factory=dict)  # by number
    is_checked: bool = False  # its weights were read back since it was started


class Workers:
    """See the module's docstring. `policy_version` is of the weights that the workers hold."""

    def __init__(self, config: SGLangConfig, engine_args: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> None:
        """Starts them and waits. `folder`: private, for sockets and logs; `dtype`: that floating weights are sent in.

        Raises OSError when the interpreter cannot be run, and RuntimeError, with the end of the worker's log, when
        SGLang does not start.
        """
        self.policy_version = 0
        self.num_restarts = 0
        self._config = config
        self._store = WeightStore(config.bucket_mb << 20, dtype)
        self._next_number = 0
        self._failures_in_a_row = 0
        self.seats = [
            Seat(WorkerProcess(config.python or sys.executable, engine_args, folder, f"worker-{index}"))
            for index in range(config.num_workers)
        ]
        try:
            for seat in self.seats:
                seat.worker.start()
            for seat in self.seats:
                seat.worker.wait_ready(config.start_timeout_s)
        except WorkerGoneError as error:
            self.close()
            raise RuntimeError(f"SGLang does not start: its worker {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def has_weights(self) -> bool:
        """False before the first whole load, and after one that broke off."""
        return self._store.is_whole

    def next_number(self) -> int:
        """Of a message that wants an answer; never given twice."""
        self._next_number += 1
        return self._next_number

    def load(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        changed = self._store.update(weights)
        previous, self.policy_version = self.policy_version, policy_version
        try:
            for seat in self.seats:
                try:
                    self._feed(seat, changed if seat.is_checked else self._store.all())
                except WorkerGoneError as error:
                    self.revive(seat, str(error))
        except BaseException:
            self.policy_version = previous
            raise

    def note_success(self) -> None:
        """A worker answered: failures are counted anew."""
        self._failures_in_a_row = 0

    def revive(self, seat: Seat, reason: str) -> list[Request]:
        """Start the worker again, with the current weights, and give back the requests that it had.

        Raises RuntimeError after `max_restarts` starts in a row without one answer.
        """
        lost = list(seat.requests.values())
        seat.requests.clear()
        while True:
            self._failures_in_a_row += 1
            if self._failures_in_a_row > self._config.max_restarts:
                seat.worker.kill()
                raise RuntimeError(
                    f"SGLang workers failed {self._failures_in_a_row} times in a row (rollout.sglang.max_restarts is "
                    f"{self._config.max_restarts}), the last one because it {reason}"
                )
            print(f"SGLang worker {seat.worker.log.stem} is started again: it {reason}", file=sys.stderr)
            time.sleep(min(self._config.backoff_s * 2 ** (self._failures_in_a_row - 1), MAX_BACKOFF_S))
            self.num_restarts += 1
            seat.is_checked = False
            try:
                seat.worker.start()
                seat.worker.wait_ready(self._config.start_timeout_s)
                self._feed(seat, self._store.all())
                return lost
            except WorkerGoneError as error:
                reason = str(error)

    def close(self) -> None:
        """End the workers and free the memory."""
        for seat in self.seats:
            seat.worker.stop()
        self._store.close()

    def _feed(self, seat: Seat, batches: Sequence[Batch]) -> None:
        """Raises WorkerGoneError when the worker must be started again, RuntimeError when it holds other weights."""
        for index, (bucket, slots) in enumerate(batches):
            fields = {
                "id": self.next_number(),
                "entries": [slot.as_json() for slot in slots],
                "policy_version": self.policy_version,
                "is_first": index == 0,
                "is_last": index == len(batches) - 1,
                "check": not seat.is_checked,
            }
            answer = seat.worker.ask("weights", fields, {"bytes_B": bucket.memory}, self._config.timeout_s)
            if answer.kind != "loaded":
                seat.worker.kill()
                raise WorkerGoneError(f"did not take weights: {answer.fields.get('reason', answer.kind)}")
            if answer.fields["wrong"]:
                seat.worker.kill()
                raise RuntimeError(
                    "SGLang's model does not hold the weights it was sent: " + "; ".join(answer.fields["wrong"])
                )
        seat.is_checked = True
