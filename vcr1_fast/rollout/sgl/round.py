"""One `generate` call of the SGLang engine: its prompts handed out, watched and answered."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vcr1_fast.rollout.sgl.channel import ready_ones
from vcr1_fast.rollout.sgl.link import WorkerGoneError
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.workers import Request, Seat, Workers
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import Completion, RunError

POLL_S = 0.1  # between two looks at deadlines and interruptions; answers wake it at once

Encode = Callable[[int, Request], tuple[dict[str, Any], dict[str, Tensor]]]  # number and request -> message
Decode = Callable[[Message, Request], list[Completion]]
Answers = dict[int, list[Completion]]  # by the requests' indices


class Round:
    """All G completions of a prompt go to one worker in one request, so that its video is prefilled once; the least
    loaded worker gets the next prompt. Those of a worker that died, or is late with one, are done again by the one
    started in its place.
    """

    def __init__(
        self,
        workers: Workers,
        config: SGLangConfig,
        requests: Sequence[Request],
        *,
        encode: Encode,
        decode: Decode,
        is_enough: Callable[[Answers], bool],
    ) -> None:
        """`is_enough`: whether `run` may come back with these answers, as after `interrupt`."""
        self._workers, self._config = workers, config
        self._encode, self._decode, self._is_enough = encode, decode, is_enough
        self._waiting = deque(requests)
        self._num_open = len(self._waiting)
        self._answers: Answers = {}
        self._is_interrupted = threading.Event()
        self._told: set[int] = set()  # seats that know of it

    def run(self) -> Answers:
        """The completions; after an interruption, or when they are enough, some may be unfinished or missing. Raises
        ValueError for a prompt that the engine cannot take, and RuntimeError when a request or the workers failed too
        often."""
        try:
            while len(self._answers) < self._num_open:
                if self._is_interrupted.is_set() or self._is_enough(self._answers):
                    self._wind_up()
                else:
                    self._hand_out()
                if not self._take_answers():
                    self._watch()
        except BaseException:
            self._give_up()
            raise
        return self._answers

    def interrupt(self) -> None:
        """`run`, in another thread, comes back soon with what there is."""
        self._is_interrupted.set()

    def _wind_up(self) -> None:
        """Ask the workers for what they have, and for nothing more."""
        self._num_open -= len(self._waiting)
        self._waiting.clear()
        for index, seat in enumerate(self._workers.seats):
            if seat.requests and index not in self._told:
                self._told.add(index)
                self._send(seat, "interrupt", {"id": 0}, {})

    def _hand_out(self) -> None:
        while self._waiting:
            seat = min(self._workers.seats, key=lambda seat: len(seat.requests))
            if len(seat.requests) >= self._config.max_inflight:
                return
            request = self._waiting.popleft()
            number = self._workers.next_number()
            request.deadline = time.monotonic() + self._config.timeout_s
            seat.requests[number] = request
            self._send(seat, "generate", *self._encode(number, request))

    def _take_answers(self) -> bool:
        """Whether anything came within POLL_S."""
        seats = {seat.worker.channel: seat for seat in self._workers.seats if seat.worker.is_ready}
        ready = ready_ones(list(seats), POLL_S)
        for channel in ready:
            seat = seats[channel]
            try:
                message = seat.worker.answer(0)
            except TimeoutError:
                continue
            except (OSError, EOFError, ValueError) as error:
                self._revive(seat, f"is gone: {error}")
                continue
            request = seat.requests.pop(int(message.fields["id"]), None)
            if request is not None:  # None: of a call that was given up
                self._settle(request, message)
        return bool(ready)

    def _settle(self, request: Request, message: Message) -> None:
        """What one answer means for its request."""
        name = request.prompt.example.id
        if message.kind == "completions":
            self._answers[request.index] = self._decode(message, request)
            self._workers.note_success()
        elif message.kind == "refused":
            raise ValueError(f"the prompt of example {name!r} cannot be answered: {message.fields['reason']}")
        else:
            self._note_failure(request, str(message.fields["reason"]))
            self._waiting.append(request)

    def _note_failure(self, request: Request, reason: str) -> None:
        request.num_attempts += 1
        if request.num_attempts >= self._config.max_attempts:
            name = request.prompt.example.id
            raise RunError(
                f"the answers to example {name!r} failed {request.num_attempts} times (rollout.sglang.max_attempts), "
                f"the last time because: {reason}"
            )

    def _watch(self) -> None:
        """Nothing came for a while: start workers again that are late."""
        now, reason = time.monotonic(), f"took longer than {self._config.timeout_s:g} s (rollout.sglang.timeout_s)"
        for seat in self._workers.seats:
            late = [request for request in seat.requests.values() if request.deadline < now]
            for request in late:
                self._note_failure(request, reason)
            if late:
                self._revive(seat, reason)

    def _send(self, seat: Seat, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            seat.worker.send(kind, fields, tensors)
        except (OSError, WorkerGoneError) as error:
            self._revive(seat, f"took no request: {error}")

    def _revive(self, seat: Seat, reason: str) -> None:
        """Its requests go to the front of the queue, in their order."""
        self._waiting.extendleft(reversed(self._workers.revive(seat, reason)))

    def _give_up(self) -> None:
        """Free the workers of what nobody waits for any more."""
        for seat in self._workers.seats:
            with contextlib.suppress(OSError, WorkerGoneError):  # found by the next send
                for number in seat.requests:
                    seat.worker.channel.send("abort", {"id": number})
            seat.requests.clear()
