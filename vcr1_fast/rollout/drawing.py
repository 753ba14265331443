"""Answers under way: who may ask the rollout engine when, and what it gave so far, call by call.

What is drawn already is not asked for again: not after new weights cut a call short, and not after a restart. Called by
rollout/queue.py.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vcr1_fast.rollout.collect import Collector
from vcr1_fast.rollout.engine import NOT_BEGUN, Quota, RolloutEngine, is_done
from vcr1_fast.tasks.scoring import Scored
from vcr1_fast.types import Completion, Prompt, SamplingParams

Decode = Callable[[list[list[int]]], list[str]]  # token ids of completions -> their texts

POLL_S = 0.2  # between two requests to stop: one that came just before the engine began was not heard
NO_AGE = sys.maxsize  # the policy version of answers without a token


@dataclass(frozen=True, eq=False)
class Answers:
    """What was drawn for one example so far; some completions may be unfinished."""

    example_id: str
    completions: list[Completion]
    policy_version: int = NO_AGE  # of the oldest weights that drew any of their tokens


def not_begun(example_id: str, num_completions: int) -> Answers:
    return Answers(example_id, [NOT_BEGUN] * num_completions)


def matched(prompts: Sequence[Prompt], kept: Sequence[Answers]) -> list[Answers | None]:
    """Of each prompt the first of `kept` that is its own, each of them once: some videos may not be readable any more,
    and an example may come twice."""
    kept_of: defaultdict[str, list[Answers]] = defaultdict(list)
    for answers in reversed(kept):
        kept_of[answers.example_id].append(answers)
    own = [kept_of[prompt.example.id] for prompt in prompts]
    return [answers.pop() if answers else None for answers in own]


def as_tensors(step: int, calls: Sequence[Sequence[Answers]]) -> dict[str, Tensor]:
    """For a checkpoint. Texts are left out, they follow from the ids."""
    tensors: dict[str, Tensor] = {}
    for index, call in enumerate(calls):
        flat = [NOT_BEGUN, *(c for answers in call for c in answers.completions)]
        about = [
            (answers.example_id, answers.policy_version, [(c.num_tokens, c.finish_reason) for c in answers.completions])
            for answers in call
        ]
        tensors[f"{step}.{index}.about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        tensors[f"{step}.{index}.token_ids"] = torch.cat([c.token_ids_R for c in flat])
        tensors[f"{step}.{index}.logprobs"] = torch.cat([c.logprobs_R for c in flat])
    return tensors


def of_tensors(step: int, tensors: Mapping[str, Tensor], decode: Decode, oldest: int) -> list[list[Answers]]:
    """The inverse, but that what weights before `oldest` drew a token of is not begun. Empty where nothing was kept."""
    calls: list[list[Answers]] = []
    while (name := f"{step}.{len(calls)}") + ".about" in tensors:
        about = json.loads(tensors[f"{name}.about"].numpy().tobytes())
        lengths, reasons = zip(*(pair for *_, pairs in about for pair in pairs), strict=True) if about else ((), ())
        ids, logprobs = (tensors[f"{name}.{part}"].split(lengths) for part in ("token_ids", "logprobs"))
        texts = decode([ids_R.tolist() for ids_R in ids])
        flat = map(Completion, ids, logprobs, reasons, texts)
        drawn = [Answers(example_id, [next(flat) for _ in pairs], version) for example_id, version, pairs in about]
        calls.append([a if a.policy_version >= oldest else not_begun(a.example_id, len(a.completions)) for a in drawn])
    return calls


class Turns:
    """The engine for one at a time: whoever draws answers, or, while these are paused, the caller."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._engine_lock, self._may_ask, self._is_closed = threading.Lock(), threading.Event(), False
        self._may_ask.set()

    def ask(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, begun: Sequence[Answers], quota: Quota | None
    ) -> list[Answers]:
        """One call of the engine, once it is not paused. Some answers may come back unfinished."""
        self._may_ask.wait()  # who wants to pause comes first: the lock alone is not fair
        with self._engine_lock:
            if self._is_closed:
                raise InterruptedError("the queue of rollouts was closed")
            version = self.engine.policy_version
            got = self.engine.generate(prompts, sampling, [answers.completions for answers in begun], quota)
        return [
            Answers(before.example_id, group, min(before.policy_version, version))
            if any(completion.num_tokens for completion in group)
            else replace(before, completions=group)
            for before, group in zip(begun, got, strict=True)
        ]

    @contextmanager
    def paused(self, *, interrupt: bool) -> Iterator[None]:
        """The engine is the caller's alone inside the block. `interrupt`: the call under way is cut short for it."""
        self._may_ask.clear()
        is_mine = False
        while not is_mine:
            if interrupt:
                self.engine.interrupt()
            is_mine = self._engine_lock.acquire(timeout=POLL_S)
        try:
            yield
        finally:
            self._engine_lock.release()
            self._may_ask.set()

    def close(self) -> None:
        """Cut short what is being drawn; whoever asks from now on gets an InterruptedError."""
        with self.paused(interrupt=True):
            self._is_closed = True


class Drawing:
    """Answers to some prompts, done or not. To the collector this is the engine."""

    def __init__(
        self,
        turns: Turns,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        carried: Sequence[tuple[Prompt, Answers]] = (),
        num_left: int = 0,
    ) -> None:
        """`carried`: the `left` of another drawing, which is done before this one begins; all of it is finished here.
        `num_left`: so many prompts need not be."""
        self.sampling = sampling
        self.calls: list[list[Answers]] = []  # what each `generate` got so far, here or before a restart
        self.left: list[tuple[Prompt, Answers]] = []  # filled once it is done
        self.done: Future[Scored] = Future()
        self.duration_s = 0.0
        self._turns, self._prompts, self._carried, self._num_left = turns, prompts, carried, num_left
        self._num_asked = 0  # calls of `generate`
        self._version_of: dict[int, int] = {}  # by the id() of a prompt

    @property
    def policy_version(self) -> int:
        """Of the weights now loaded; which of them drew a group is noted in the end."""
        return self._turns.engine.policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
        """As the engine's, but goes on after interruptions until all completions are finished, or, in the first call,
        enough of them: prompts that are left have none."""
        index, self._num_asked = self._num_asked, self._num_asked + 1
        num_required, num_left = (len(self._carried), self._num_left) if index == 0 else (0, 0)
        quota = Quota(max(len(prompts) - num_left, num_required), num_required)
        kept, size = self.calls[index] if index < len(self.calls) else [], sampling.num_completions
        call = [
            own if own and len(own.completions) == size else not_begun(prompt.example.id, size)
            for prompt, own in zip(prompts, matched(prompts, kept), strict=True)
        ]
        while True:
            self.calls[index : index + 1] = [call]
            are_done = [is_done(answers.completions) for answers in call]
            if quota.is_met(are_done):
                break
            call = self._turns.ask(prompts, sampling, call, quota if num_left else None)
        taken = quota.taken(are_done)
        self.left += [(prompts[place], call[place]) for place in range(len(call)) if place not in taken]
        self._version_of |= {id(prompt): answers.policy_version for prompt, answers in zip(prompts, call, strict=True)}
        return [answers.completions if place in taken else [] for place, answers in enumerate(call)]

    def run(self, collector: Collector) -> None:
        """Draw and score; what that raises comes out of `done`."""
        began_s = time.perf_counter()
        try:
            self.calls = self.calls or [[answers for _, answers in self._carried]]
            prompts = [*(prompt for prompt, _ in self._carried), *self._prompts]
            scored = collector.draw(self, prompts, self.sampling)
            groups = [replace(group, policy_version=self._version_of[id(group.prompt)]) for group in scored.groups]
            self.duration_s = time.perf_counter() - began_s
            self.done.set_result(replace(scored, groups=groups))
        except BaseException as error:
            self.done.set_exception(error)
