"""Which prompts are answered when: up to `rollout.max_policy_lag` steps ahead of the learner, in the order of the data.

    for step s:   fill(s)         the prompts of steps s .. s + lag are in the queue
                  take(s)         waits for the answers of step s
                  (update)        meanwhile those of later steps are drawn
                  with paused():  the engine is free: new weights, evaluation

The answers of step s + lag are begun after the update of step s - 1 at the earliest, so that no answer is older than
`lag` updates when it is learned from. With lag 0 this is the synchronous loop: everything happens in the caller's
thread, in `take`. With lag k answers are drawn in a thread of its own, one step after the other.

New weights wait for the step that is being drawn, or, with `rollout.interrupt`, cut it short: its answers are gone on
with afterwards, by the new weights, each token with the log-prob of those that drew it. A checkpoint keeps what is
drawn ahead: a resumed run with lag 1, and without interruptions, is the same bit for bit where the engine is.

A step may leave groups that are not finished to the next one (over_provision.py).

All ranks call the same methods in the same order. Collectives happen in the caller's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vcr1_fast.learner.sharding import all_max_int, all_reduce_sum, gather_all
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.rollout.collect import Collector, Drawn
from vcr1_fast.rollout.drawing import Call, Decode, Drawing, Turns
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.over_provision import OverProvision, Tail
from vcr1_fast.types import Prompt, RolloutGroup, SamplingParams

TAIL = "tail"


def _parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@dataclass
class _Step:
    """The prompts of one step and what was drawn for them."""

    number: int
    position: int  # of the stream before its prompts
    again: dict[str, tuple[int, int]]  # the same
    count: int  # of items taken from it, over all ranks
    prompts: list[Prompt]
    sampling: SamplingParams
    drawing: Drawing = field(init=False)
    tail: Tail = field(default_factory=Tail)  # what it left for the next step, once it is drawn


class RolloutQueue:
    """See the module's docstring."""

    def __init__(
        self,
        engine: RolloutEngine,
        collector: Collector,
        prompts: PromptStream,
        sampling_of: Callable[[int], SamplingParams],
        decode: Decode,
    ) -> None:
        """`sampling_of(step)`: how the step's answers are drawn, with a seed of its own. `decode`: the tokenizer's, for
        answers that a checkpoint kept."""
        self._collector, self._prompts = collector, prompts
        self._engine, self._sampling_of, self._decode = engine, sampling_of, decode
        self._train, rollout = collector.config.train, collector.config.rollout
        self._lag, self._most_behind = rollout.max_policy_lag, rollout.most_updates_behind
        self._interrupts = rollout.interrupt
        self._turns = Turns(engine, is_threaded=self._lag > 0, interrupts=rollout.interrupt)
        self._over_provision = OverProvision(collector)
        self._steps: list[_Step] = []  # in the order of their numbers
        self._taken: _Step | None = None  # the one before them, if it left something
        self._metrics: dict[str, float] = {}

    def fill(self, step: int) -> None:
        """Take the prompts of all steps up to `step` + lag, but none beyond the last, and begin to answer them."""
        last = min(step + self._lag, self._train.num_steps)
        for number in range(self._steps[-1].number + 1 if self._steps else step, last + 1):
            has_tail = bool(self._steps) or self._taken is not None
            self._begin(number, self._over_provision.num_begun(number, has_tail=has_tail), calls=())

    def take(self, step: int) -> list[RolloutGroup]:
        """This rank's groups of one step, once they are there. Those without a score are left out, and their prompts
        come again. Raises what drawing them raised, and RewardsFailedError."""
        assert self._steps and self._steps[0].number == step, "fill(step) first; steps are taken in order"
        taken = self._steps.pop(0)
        drawn = taken.drawing.result()
        self._taken = taken if self._over_provision.num_extra and step < self._train.num_steps else None
        groups = self._collector.complete(drawn, taken.sampling, self._prompts.next, self._draw_now)
        self._prompts.put_back(self._collector.failed_ids)
        self._measure(groups, taken.drawing.duration_s)
        return groups

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is drawn, so that weights may change and others may ask the engine.

        Without `rollout.interrupt` the answers of the next step are waited for, too: the caller needs them next, and
        drawn by the old weights in any case they make a run with lag 1 the same each time.
        """
        if self._steps and not self._interrupts:
            self._steps[0].drawing.wait()
        with self._turns.paused():
            yield

    def metrics(self) -> dict[str, float]:
        """Of the last `take`: those of the engine and, with a lag or rollout.over_provision, sampling/policy_lag/mean
        and /max: updates between drawing and learning, over the groups of all ranks; time/draw_s: how long drawing took
        on this rank, beside or before the learner's work. What the learner waited for is the span around `take`."""
        return self._metrics

    def close(self) -> None:
        """End the thread; what is being drawn is cut short."""
        self._turns.close()

    def pending(self) -> dict[str, Any]:
        """What a checkpoint must keep: {"pending": steps that wait in the queue, before them the one that left
        something for them, "answers": this rank's tensors, its answers as far as they are drawn, "again" of the
        stream, "failed_steps" of the collector}. All but the answers are the same on all ranks. A collective."""
        steps: list[dict[str, Any]] = []
        answers: dict[str, Tensor] = {}
        for step in [*([self._taken] if self._taken else []), *self._steps]:
            where = {"step": step.number, "position": step.position, "again": dict(step.again), "count": step.count}
            steps.append(where)
        if self._taken:
            left = gather_all([prompt.example.id for prompt in self._taken.tail.prompts], self._collector.world)
            steps[0] |= {"is_taken": True, "left": [name for names in left for name in names]}
            tail = self._taken.tail.as_tensors()
            answers |= {f"{self._taken.number}.{TAIL}.{name}": value for name, value in tail.items()}
        for step in self._steps:
            for index, call in enumerate(step.drawing.calls):
                answers |= {f"{step.number}.{index}.{name}": value for name, value in call.as_tensors().items()}
        failures = {"again": dict(self._prompts.again), "failed_steps": dict(self._collector.failed_steps)}
        return {"pending": steps, "answers": answers, **failures}

    def restore(
        self,
        steps: Sequence[Mapping[str, Any]],
        answers: Mapping[str, Tensor],
        again: Mapping[str, Sequence[int]],
        failed_steps: Mapping[str, int],
    ) -> None:
        """Go on with what `pending` gave. A collective. Answers that are not there, do not fit the prompts because a
        video cannot be read any more, or are older than the settings now allow, are drawn anew. So are groups that a
        step left, on another number of ranks, where each had other prompts: they come again next."""
        position, now = self._prompts.position, self._engine.policy_version
        self._collector.failed_steps = dict(failed_steps)
        lost: set[str] = set()
        first = next((step["step"] for step in steps if not step.get("is_taken")), 0)
        for step in steps:
            self._prompts.restore(step["position"], step.get("again", {}))
            if step.get("is_taken"):
                kept = self._restore_tail(step, _parts(answers, f"{step['step']}.{TAIL}."))
                lost = set(step.get("left", ())).difference(*gather_all(kept, self._collector.world))
                continue
            calls: list[Call] = []
            while parts := _parts(answers, f"{step['step']}.{len(calls)}."):
                calls.append(Call.of_tensors(parts, self._decode))
            oldest = now + step["step"] - first - self._most_behind  # step k from now is learned from after k updates
            self._begin(step["step"], step["count"], calls if all(call.is_since(oldest) for call in calls) else ())
        self._prompts.restore(position, {**again, **dict.fromkeys(sorted(lost), (0, position))})

    def _restore_tail(self, step: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
        """What the step that was learned from last left for the next one: the ids of these prompts."""
        if not tensors:
            return []
        self._taken = taken = self._next_step(step["step"], step["count"])
        tail = Tail.of_tensors(tensors, taken.prompts, self._decode)
        if not tail.call.is_since(self._engine.policy_version - self._most_behind):
            tail = replace(tail, call=Call([], []))
        taken.tail = self._over_provision.tail = tail
        return [prompt.example.id for prompt in tail.prompts]

    def _next_step(self, number: int, count: int) -> _Step:
        """With the next `count` prompts of the stream; not begun."""
        position, again = self._prompts.position, dict(self._prompts.again)
        return _Step(number, position, again, count, self._prompts.next(count), self._sampling_of(number))

    def _begin(self, number: int, count: int, calls: Sequence[Call]) -> None:
        step = self._next_step(number, count)

        def work(drawing: Drawing) -> Drawn:
            drawn = self._over_provision.draw(number, step.prompts, step.sampling, drawing)
            step.tail = self._over_provision.tail
            return drawn

        step.drawing = self._turns.begin(number, work, calls)
        self._steps.append(step)

    def _draw_now(self, prompts: list[Prompt], sampling: SamplingParams) -> Drawn:
        """Before what waits, but after what is being drawn."""
        return self._turns.begin(0, lambda engine: self._collector.draw(engine, prompts, sampling), ()).result()

    def _measure(self, groups: Sequence[RolloutGroup], draw_s: float) -> None:
        """Raises RuntimeError when a group is older than the lag allows, which would be an error of this module."""
        world = self._collector.world
        self._metrics = all_reduce_sum(self._engine.metrics(), world)
        most = self._collector.config.rollout.most_updates_behind
        if most == 0:
            return
        lags = [self._engine.policy_version - group.policy_version for group in groups]
        longest = all_max_int(max(lags, default=0), world)
        if longest > most:
            raise RuntimeError(f"answers are {longest} updates old, wanted at most {most}")
        sums = all_reduce_sum({"lag": float(sum(lags)), "groups": float(len(lags))}, world)
        self._metrics |= {
            "sampling/policy_lag/mean": sums["lag"] / max(sums["groups"], 1.0),
            "sampling/policy_lag/max": float(longest),
            "time/draw_s": draw_s,
        }
