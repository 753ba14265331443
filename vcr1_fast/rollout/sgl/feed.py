"""The questions of one load of weights, put to several workers at once, and who was lost on the way.

Made by workers.py for each load, used by the ways of delivery.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from vcr1_fast.rollout.sgl.link import WorkerGoneError
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.types import RunError

if TYPE_CHECKING:
    from vcr1_fast.rollout.sgl.workers import Seat

Payload = Mapping[str, Any]  # tensors of a message
NextNumber = Callable[[], int]
POLL_S = 0.1
TOGETHER = "lost the broadcast of weights together with another worker"


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
        """`timeout_s`: from a question to its answer."""
        self.lost: dict[int, str] = {}  # by index in `seats`
        self.timeout_s = timeout_s
        self._seats, self._next_number, self._version = seats, next_number, policy_version
        self._checked = [not seat.is_checked for seat in seats]
        self._is_first = True
        self._asked: dict[int, int] = {}  # index of a worker -> number of its question
        self._deadline = 0.0
        self._wrong: list[str] = []  # weights that a worker holds otherwise than it was sent

    @property
    def wants_checksums(self) -> bool:
        return any(self._checked[index] for index in self.live)

    @property
    def live(self) -> list[int]:
        return [index for index in range(len(self._seats)) if index not in self.lost]

    def ask(self, kind: str, fields_of: Callable[[int], Mapping[str, Any]], tensors: Payload | None = None) -> None:
        """Send to each live worker what `fields_of(its index)` says."""
        self._deadline = time.monotonic() + self.timeout_s
        for index in self.live:
            self._asked[index] = number = self._next_number()
            try:
                self._seats[index].worker.send(kind, {"id": number, **fields_of(index)}, tensors or {})
            except (OSError, WorkerGoneError) as error:
                self._lose(index, f"took no {kind}: {error}")

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
        common = {"source": source, "entries": entries, "policy_version": self._version}
        common |= {"is_first": self._is_first, "is_last": is_last}
        self._is_first = False
        self.ask("weights", lambda index: {**common, "check": self._checked[index], **details_of(index)}, tensors)

    def finish(self) -> None:
        """Wait for all answers. Raises RuntimeError when a worker holds other weights than it was sent."""
        while self._asked:
            self._take_answers()
        wrong, self._wrong = self._wrong, []
        if wrong:
            raise RunError("SGLang's model does not hold the weights it was sent: " + "; ".join(wrong))

    def finish_together(self, is_broken: Callable[[], bool] = lambda: False) -> None:
        """`finish` for workers that wait for each other: when one fails, or `is_broken`, none of them comes back."""
        num_lost = len(self.lost)
        while self._asked and len(self.lost) == num_lost and not is_broken():
            self._take_answers()
        if self._asked or len(self.lost) > num_lost:
            self.give_up(TOGETHER)
        self.finish()

    def give_up(self, reason: str) -> None:
        """End every worker that has not failed by itself."""
        for index in self.live:
            self._lose(index, reason)

    def _take_answers(self) -> None:
        """One of each worker, as far as they come within POLL_S; who is gone, or late, is lost."""
        for index in list(self._asked):
            try:
                self._take(index, self._seats[index].worker.answer(POLL_S))
            except TimeoutError:
                if time.monotonic() > self._deadline:
                    self._lose(index, f"gave no answer within {self.timeout_s:g} s")
            except (OSError, EOFError, ValueError, WorkerGoneError) as error:
                self._lose(index, f"gave no answer ({type(error).__name__}: {error})")

    def _take(self, index: int, answer: Message) -> None:
        if answer.fields.get("id") != self._asked[index]:
            return  # to a request that was given up
        if answer.kind != "loaded":
            return self._lose(index, f"did not take weights: {answer.fields.get('reason', answer.kind)}")
        del self._asked[index]
        if answer.fields.get("wrong"):
            self._wrong += answer.fields["wrong"]
            self._seats[index].worker.kill()

    def _lose(self, index: int, reason: str) -> None:
        self._asked.pop(index, None)
        self.lost[index] = str(self._seats[index].worker.gone(reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a whole load the live workers are known to hold what was sent."""
        if kind is None:
            for index in self.live:
                self._seats[index].is_checked = True
