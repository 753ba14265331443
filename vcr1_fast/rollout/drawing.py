"""Who may use the rollout engine when: one drawing after the other, or, while these are paused, the caller.

Called by rollout/queue.py. A `Drawing` is one piece of work that asks the engine, such as "answer and score these
prompts". It keeps what the engine gave, call by call, so that work that was cut short, or a run that was killed, goes
on where it stood: what is drawn already is not asked for again.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vcr1_fast.rollout.collect import Drawn
from vcr1_fast.rollout.engine import NOT_BEGUN, Quota, RolloutEngine, is_done
from vcr1_fast.types import Completion, FinishReason, Prompt, SamplingParams

Work = Callable[["Drawing"], Drawn]
Decode = Callable[[list[list[int]]], list[str]]  # token ids of completions -> their texts

POLL_S = 0.2  # between two requests to stop: one that came just before the engine began was not heard
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "aborted")  # their numbers in a checkpoint


@dataclass(frozen=True)
class Call:
    """What the engine gave to one `generate`: G completions of each prompt, some perhaps unfinished."""

    answers: list[list[Completion]]
    policy_versions: list[int]  # by prompt, of the oldest weights that drew a token of its completions

    @property
    def are_done(self) -> list[bool]:
        """By prompt, whether its completions are finished."""
        return [is_done(group) for group in self.answers]

    def is_enough(self, quota: Quota | None) -> bool:
        return quota.is_met(self.are_done) if quota else all(self.are_done)

    def is_since(self, policy_version: int) -> bool:
        """Whether no older weights drew any token of it."""
        return all(
            version >= policy_version or not any(completion.num_tokens for completion in group)
            for version, group in zip(self.policy_versions, self.answers, strict=True)
        )

    def at(self, places: Sequence[int]) -> Call:
        """The same of some of the prompts."""
        return Call([self.answers[i] for i in places], [self.policy_versions[i] for i in places])

    def with_fresh(self, num_prompts: int) -> Call:
        """With so many more prompts, whose completions are not begun."""
        fresh = [[NOT_BEGUN] * len(self.answers[0]) for _ in range(num_prompts)]
        return Call(self.answers + fresh, self.policy_versions + [0] * num_prompts)

    def fits(self, num_prompts: int, num_completions: int) -> bool:
        return len(self.answers) == num_prompts and all(len(group) == num_completions for group in self.answers)

    def as_tensors(self) -> dict[str, Tensor]:
        """For a checkpoint. Texts are left out, they follow from the ids."""
        flat = [c for group in self.answers for c in group]
        return {
            "sizes": torch.tensor([len(group) for group in self.answers], dtype=torch.int64),
            "lengths": torch.tensor([c.num_tokens for c in flat], dtype=torch.int64),
            "reasons": torch.tensor([_REASONS.index(c.finish_reason) for c in flat], dtype=torch.int64),
            "token_ids": torch.cat([c.token_ids_R for c in flat]) if flat else torch.zeros(0, dtype=torch.int64),
            "logprobs": torch.cat([c.logprobs_R for c in flat]) if flat else torch.zeros(0),
            "policy_versions": torch.tensor(self.policy_versions, dtype=torch.int64),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], decode: Decode) -> Call:
        """The inverse of `as_tensors`."""
        lengths: list[int] = tensors["lengths"].tolist()
        ids, logprobs = tensors["token_ids"].split(lengths), tensors["logprobs"].split(lengths)
        texts = decode([ids_R.tolist() for ids_R in ids])
        reasons = [_REASONS[i] for i in tensors["reasons"].tolist()]
        flat = iter([Completion(*parts) for parts in zip(ids, logprobs, reasons, texts, strict=True)])
        answers = [[next(flat) for _ in range(size)] for size in tensors["sizes"].tolist()]
        return cls(answers, tensors["policy_versions"].tolist())


class Drawing:
    """One piece of work, done or not. To it, this is the engine: it asks `generate` and reads `policy_version`."""

    def __init__(self, turns: Turns, work: Work, calls: Sequence[Call]) -> None:
        """`calls`: what an earlier drawing of the same work got already."""
        self.calls = list(calls)
        self.quota: Quota | None = None  # of the first call
        self.policy_version = 0  # of the oldest answer that generate gave last
        self.duration_s = 0.0
        self._turns = turns
        self._work = work
        self._num_calls = 0  # done by the work so far
        self.done: Future[Drawn] = Future()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
        """As the engine's, but goes on after interruptions until every completion is finished, or `quota` is met: then
        prompts that do not count have no completions."""
        index = self._num_calls
        self._num_calls += 1
        if index < len(self.calls) and not self.calls[index].fits(len(prompts), sampling.num_completions):
            del self.calls[index:]  # a video that cannot be read any more, for example: the prompts are others
        quota = self.quota if index == 0 else None
        while index == len(self.calls) or not self.calls[index].is_enough(quota):
            before = self.calls[index] if index < len(self.calls) else None
            self.calls[index:] = [self._turns.ask(prompts, sampling, before, quota)]
        call = self.calls[index]
        taken = quota.taken(call.are_done) if quota else range(len(prompts))
        self.policy_version = min((call.policy_versions[i] for i in taken), default=0)
        return [group if i in taken else [] for i, group in enumerate(call.answers)]

    def run(self) -> None:
        """Do the work; what it raises comes out of `result`."""
        began = time.perf_counter()
        try:
            drawn = self._work(self)
            self.duration_s = time.perf_counter() - began
            self.done.set_result(drawn)
        except BaseException as error:
            self.done.set_exception(error)

    def wait(self) -> None:
        """For the work, or do it now where no thread does."""
        if not self._turns.is_threaded and not self.done.done():
            self.run()
        wait([self.done])

    def result(self) -> Drawn:
        """Wait, and raise what the work raised."""
        self.wait()
        return self.done.result()


class Turns:
    """See the module's docstring."""

    def __init__(self, engine: RolloutEngine, *, is_threaded: bool, interrupts: bool) -> None:
        """`is_threaded`: drawings are done in a thread, those of the lowest order first; else when their result is
        asked for. `interrupts`: `paused` cuts the one under way short instead of waiting for its answers."""
        self._engine, self._interrupts = engine, interrupts
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Drawing]] = []
        self._num_begun = 0
        self._num_pauses = 0
        self._is_asking = self._is_closed = False
        self.is_threaded = is_threaded
        self._thread = threading.Thread(target=self._serve, name="draw-answers", daemon=True)
        if is_threaded:
            self._thread.start()

    def begin(self, order: int, work: Work, calls: Sequence[Call]) -> Drawing:
        """Queue some work."""
        drawing = Drawing(self, work, calls)
        if self.is_threaded:
            with self._changed:
                heapq.heappush(self._waiting, (order, self._num_begun, drawing))
                self._num_begun += 1
                self._changed.notify_all()
        return drawing

    def ask(self, prompts: Sequence[Prompt], sampling: SamplingParams, begun: Call | None, quota: Quota | None) -> Call:
        """One call of the engine, when it is not paused. Some answers may come back unfinished."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_pauses == 0 or self._is_closed)
            if self._is_closed:
                raise InterruptedError("the queue of rollouts was closed")
            self._is_asking = True
        try:
            version = self._engine.policy_version
            answers = self._engine.generate(prompts, sampling, begun.answers if begun else None, quota)
        finally:
            with self._changed:
                self._is_asking = False
                self._changed.notify_all()
        if begun is None:
            return Call(answers, [version] * len(prompts))
        has_tokens = [any(completion.num_tokens for completion in group) for group in begun.answers]
        old = zip(begun.policy_versions, has_tokens, strict=True)
        return Call(answers, [before if has else version for before, has in old])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The engine is the caller's alone inside the block."""
        with self._changed:
            self._num_pauses += 1
            self._wait_until_idle(self._interrupts)
        try:
            yield
        finally:
            with self._changed:
                self._num_pauses -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Drop what waits, cut short what is being drawn, end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._wait_until_idle(interrupt=True)
        if self.is_threaded:
            self._thread.join()

    def _wait_until_idle(self, interrupt: bool) -> None:
        while self._is_asking:
            if interrupt:
                self._engine.interrupt()
            self._changed.wait(POLL_S)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                _, _, drawing = heapq.heappop(self._waiting)
            drawing.run()
