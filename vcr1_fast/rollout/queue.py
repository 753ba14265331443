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

The longest answer of a step decides when it is drawn, while most places of the engine are empty already. With
`rollout.over_provision` f the first step begins R + E groups on a rank, R = train.prompts_per_step / ranks and E = f R
rounded up; each later one goes on with the E that are left and begins R. A step ends when R groups are finished, among
them all that it went on with: none is older than by one update more than without, and none is lost. Each token keeps
the log-prob of the weights that drew it. The last step begins E fewer, so that nothing is left.

All ranks call the same methods in the same order. Collectives happen in the caller's thread alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from queue import PriorityQueue
from typing import Any

from torch import Tensor

from vcr1_fast.learner.sharding import all_max_int, all_reduce_sum, gather_all
from vcr1_fast.prompts.stream import PromptStream
from vcr1_fast.rollout.collect import Collector
from vcr1_fast.rollout.drawing import Answers, Decode, Drawing, Turns, as_tensors, matched, of_tensors
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.tasks.scoring import Scored
from vcr1_fast.types import Prompt, RolloutGroup, SamplingParams

Record = Mapping[str, Any]  # where the prompts of a step are in the stream: {"step", "position", "again", "count"}
Left = Sequence[tuple[Prompt, Answers]]  # groups that go on in the next step

_DRAW_NOW, _END = 0, -1  # come before the steps, whose numbers begin with 1


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
        self._engine, self._collector, self._prompts = engine, collector, prompts
        self._sampling_of, self._decode, self._world = sampling_of, decode, collector.world
        self._train, self._rollout = collector.config.train, collector.config.rollout
        share = self._rollout.over_provision * self._train.prompts_per_step
        self._num_left = math.ceil(share / self._world.world_size)  # E
        self._turns = Turns(engine)
        self._steps: list[tuple[Record, Drawing]] = []  # that were not taken yet, in their order
        self._taken: tuple[Record, Left] | None = None  # the one before them, if it may have left something
        self._left: Left | None = None  # of the newest step of all; None before the first
        self._last_begun = 0
        self._waiting: PriorityQueue[tuple[int, Drawing | None]] = PriorityQueue()
        self._thread = threading.Thread(target=self._serve, name="draw-answers", daemon=True)
        self._is_threaded = self._rollout.max_policy_lag > 0
        self._metrics: dict[str, float] = {}
        if self._is_threaded:
            self._thread.start()

    def fill(self, step: int) -> None:
        """Take the prompts of all steps up to `step` + lag, but none beyond the last, and begin to answer them."""
        last = min(step + self._rollout.max_policy_lag, self._train.num_steps)
        extra = self._num_left * self._world.world_size
        for number in range(self._steps[-1][0]["step"] + 1 if self._steps else step, last + 1):
            more = extra * ((self._left is None) - (number >= self._train.num_steps))
            self._add(number, self._train.prompts_per_step + more)
        self._begin(last)

    def take(self, step: int) -> list[RolloutGroup]:
        """This rank's groups of one step, once they are there. Those without a score are left out, and their prompts
        come again. Raises what drawing them raised, and RewardsFailedError."""
        assert self._steps and self._steps[0][0]["step"] == step, "fill(step) first; steps are taken in order"
        record, drawing = self._steps.pop(0)
        drawn = self._result(drawing)
        may_leave = self._num_left > 0 and step < self._train.num_steps
        self._taken = (record, drawing.left) if may_leave else None
        groups = self._collector.complete(drawn, drawing.sampling, self._prompts.next, self._draw_now)
        self._prompts.put_back(self._collector.failed_ids)
        self._measure(groups, drawing.duration_s)
        return groups

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is drawn, so that weights may change and others may ask the engine.

        Without `rollout.interrupt` the answers of the next step are waited for, too: the caller needs them next, and
        drawn by the old weights in any case they make a run with lag 1 the same each time.
        """
        if self._is_threaded and self._steps and not self._rollout.interrupt:
            wait([self._steps[0][1].done])
        with self._turns.paused(interrupt=self._rollout.interrupt):
            yield

    def metrics(self) -> dict[str, float]:
        """Of the last `take`: those of the engine and, with a lag or rollout.over_provision, sampling/policy_lag/mean
        and /max: updates between drawing and learning, over the groups of all ranks; time/draw_s: how long drawing took
        on this rank, beside or before the learner's work. What the learner waited for is the span around `take`."""
        return self._metrics

    def close(self) -> None:
        """End the thread; what is being drawn is cut short."""
        self._turns.close()
        if self._is_threaded:
            self._waiting.put((_END, None))
            self._thread.join()

    def pending(self) -> dict[str, Any]:
        """What a checkpoint must keep: {"pending": steps that wait in the queue, before them the one that left
        something for them, "answers": this rank's tensors, its answers as far as they are drawn, "again" of the
        stream, "failed_steps" of the collector}. All but the answers are the same on all ranks. A collective."""
        steps, answers = [record for record, _ in self._steps], dict[str, Tensor]()
        for record, drawing in self._steps:
            answers |= as_tensors(record["step"], drawing.calls)
        if self._taken:
            record, left = self._taken
            ids = gather_all([own.example_id for _, own in left], self._world)
            steps.insert(0, {**record, "is_taken": True, "left": [name for of_rank in ids for name in of_rank]})
            answers |= as_tensors(record["step"], [[own for _, own in left]])
        failures = {"again": dict(self._prompts.again), "failed_steps": dict(self._collector.failed_steps)}
        return {"pending": steps, "answers": answers, **failures}

    def restore(
        self,
        steps: Sequence[Record],
        answers: Mapping[str, Tensor],
        again: Mapping[str, Sequence[int]],
        failed_steps: Mapping[str, int],
    ) -> None:
        """Go on with what `pending` gave. A collective. Answers that are not there, do not fit because a video cannot
        be read any more, or are older than the settings now allow, are drawn anew. So are groups that a step left, on
        another number of ranks, where each had other prompts: they come again next."""
        position, oldest = self._prompts.position, self._engine.policy_version - self._rollout.most_updates_behind
        self._collector.failed_steps = dict(failed_steps)
        lost: set[str] = set()
        first = next((record["step"] for record in steps if not record.get("is_taken")), 0)
        for record in steps:
            number, is_taken = record["step"], record.get("is_taken", False)
            self._prompts.restore(record["position"], record.get("again", {}))
            ahead = 0 if is_taken else number - first  # step k from now is learned from after k updates
            calls = of_tensors(number, answers, self._decode, oldest + ahead)
            if not is_taken:
                self._add(number, record["count"], calls)
                continue
            if calls:
                prompts = self._prompts.next(record["count"])
                pairs = zip(prompts, matched(prompts, calls[0]), strict=True)
                self._left = [(prompt, own) for prompt, own in pairs if own]
                self._taken = (record, self._left)
            kept = gather_all([own.example_id for _, own in self._left or ()], self._world)
            lost = set(record["left"]).difference(*kept)
        self._prompts.restore(position, {**again, **dict.fromkeys(sorted(lost), (0, position))})
        self._begin(first + self._rollout.max_policy_lag)

    def _add(self, number: int, count: int, calls: Sequence[list[Answers]] = ()) -> None:
        """A step with the next `count` prompts of the stream; not begun."""
        position, again = self._prompts.position, dict(self._prompts.again)
        record = {"step": number, "position": position, "again": again, "count": count}
        num_left = self._num_left if number < self._train.num_steps else 0
        carried = () if self._left is None else self._left  # filled once that step is drawn
        drawing = Drawing(self._turns, self._prompts.next(count), self._sampling_of(number), carried, num_left)
        drawing.calls.extend(calls)
        self._left = drawing.left
        self._steps.append((record, drawing))

    def _begin(self, last: int) -> None:
        """Steps up to `last`, where a thread draws."""
        for record, drawing in self._steps:
            if self._is_threaded and self._last_begun < record["step"] <= last:
                self._waiting.put((record["step"], drawing))
                self._last_begun = record["step"]

    def _serve(self) -> None:
        while (drawing := self._waiting.get()[1]) is not None:
            drawing.run(self._collector)

    def _result(self, drawing: Drawing) -> Scored:
        if not self._is_threaded:
            drawing.run(self._collector)
        return drawing.done.result()

    def _draw_now(self, prompts: list[Prompt], sampling: SamplingParams) -> Scored:
        """Before what waits, but after what is being drawn."""
        drawing = Drawing(self._turns, prompts, sampling)
        if self._is_threaded:
            self._waiting.put((_DRAW_NOW, drawing))
        return self._result(drawing)

    def _measure(self, groups: Sequence[RolloutGroup], draw_s: float) -> None:
        """Raises RuntimeError when a group is older than the lag allows, which would be an error of this module."""
        world, most = self._world, self._rollout.most_updates_behind
        self._metrics = all_reduce_sum(self._engine.metrics(), world)
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
