"""The questions of one load of weights, put to several workers at once, and who was lost on the way.

Made by workers.py for each load, used by the ways of delivery.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self

from vcr1_fast.rollout.sgl.link import WorkerGoneError
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.types import RunError

if TYPE_CHECKING:
    from vcr1_fast.rollout.sgl.workers import Seat

Payload = Mapping[str, Any]  # tensors of a message
NextNumber = Callable[[], int]
POLL_S = 0.2


class Feed:
    """The messages of one load, the same to some workers at once: `begin` asks all of them, `finish` has the answers.

    A worker that is gone or fails is left out from then on, and `lost` says why.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        next_number: NextNumber,
        policy_version: int,
        timeout_s: float,
    ) -> None:
        self.lost: dict[int, str] = {}  # by index in `seats`
        self._seats, self._next_number = seats, next_number
        self.timeout_s = timeout_s
        self._version = policy_version
        self._checked = [not seat.is_checked for seat in seats]
        self._is_first = True
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(seats)))
        self._asked: dict[int, Future[Message]] = {}

    @property
    def wants_checksums(self) -> bool:
        return any(check for index, check in enumerate(self._checked) if index not in self.lost)

    @property
    def live(self) -> list[int]:
        return [index for index in range(len(self._seats)) if index not in self.lost]

    def ask(self, kind: str, fields_of: Callable[[int], Mapping[str, Any]], tensors: Payload | None = None) -> None:
        """Send to each live worker what `fields_of(its index)` says, from a thread each: one may be slow to take it."""
        for index in self.live:
            fields = {"id": self._next_number(), **fields_of(index)}
            worker = self._seats[index].worker
            self._asked[index] = self._pool.submit(worker.ask, kind, fields, tensors or {}, self.timeout_s)

    def begin(
        self,
        source: str,
        entries: list[dict[str, Any]],
        *,
        is_last: bool,
        tensors: Payload | None = None,
        details_of: Callable[[int], Mapping[str, Any]] = lambda _: {},
    ) -> None:
        """One bucket: where it comes from, what it holds, and `details_of(index)` of the worker."""

        is_first, self._is_first = self._is_first, False
        common = {"source": source, "entries": entries, "policy_version": self._version}
        common |= {"is_first": is_first, "is_last": is_last}
        self.ask("weights", lambda index: {**common, "check": self._checked[index], **details_of(index)}, tensors)

    def finish(self) -> None:
        """Wait for all answers. Raises RuntimeError when a worker holds other weights than it was sent."""
        wrong: list[str] = []
        for index, asked in self._asked.items():
            reason = _failure_of(asked)
            if reason is not None:
                self._seats[index].worker.kill()
                self.lost.setdefault(index, reason)
            elif asked.result().fields.get("wrong"):
                self._seats[index].worker.kill()
                wrong += asked.result().fields["wrong"]
        self._asked = {}
        if wrong:
            raise RunError("SGLang's model does not hold the weights it was sent: " + "; ".join(wrong))

    def finish_together(self, is_broken: Callable[[], bool] = lambda: False) -> None:
        """`finish` for workers that wait for each other: when one fails, or `is_broken`, none of them comes back."""
        pending = set(self._asked.values())
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
            if is_broken() or any(_failure_of(asked) is not None for asked in done):
                self.give_up("lost the broadcast of weights together with another worker")
                break
        self.finish()

    def give_up(self, reason: str) -> None:
        """End every worker that has not failed by itself."""
        for index in self.live:
            asked = self._asked.get(index)
            if asked is None or not asked.done() or _failure_of(asked) is None:
                self.lost[index] = reason
                self._seats[index].worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nobody reads an answer any more; after a whole load the live workers are known to hold what was sent."""
        self._pool.shutdown(wait=True)
        if kind is None:
            for index in self.live:
                self._seats[index].is_checked = True


def _failure_of(asked: Future[Message]) -> str | None:
    """Why there is no right answer; None when there is one. Waits for it."""
    try:
        answer = asked.result()
    except WorkerGoneError as error:
        return str(error)
    if answer.kind != "loaded":
        return f"did not take weights: {answer.fields.get('reason', answer.kind)}"
    return None
