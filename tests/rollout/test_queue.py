"""Which prompts are drawn when and by which weights: the queue of rollouts, with an engine that holds answers back."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import pytest
import torch

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.rollout.collect import Collector
from vcr1_fast.rollout.drawing import Answers, matched
from vcr1_fast.rollout.engine import Quota
from vcr1_fast.rollout.queue import RolloutQueue
from vcr1_fast.settings.config import Config, RolloutConfig, TaskConfig, TrainConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Completion, Example, IntervalTruth, Prompt, SamplingParams

GOOD, BAD = "<think>x</think><answer>2.00 to 4.00</answer>", "no idea"
NUM_TOKENS, LONG = 4, 7
LENGTHS = {"a1": LONG, "a3": LONG, "a7": LONG}
# a1 is not finished when step 1 has two groups, a3 when step 2 has, a7 when step 4 has; step 3 does not need a6
STEPS = [["a0", "a2"], ["a1", "a4"], ["a3", "a5"], ["a6", "a8"], ["a7", "a9"]]


class HeldEngine:
    """Draws a token of all answers each time `release` is called, or at once when it does not hold. A token's id is its
    place, its log-prob minus the policy version that drew it. `lengths`: tokens of a prompt's answers, by id."""

    def __init__(self, *, holds: bool) -> None:
        self.policy_version = 1
        self.lengths: dict[str, int] = {}
        self.calls: list[tuple[list[str], int, int]] = []  # ids of the prompts, seed, policy version
        self.running = threading.Event()
        self._tokens = threading.Semaphore(0)
        self._holds = holds
        self._stop = threading.Event()
        self._entered = threading.Lock()

    def release(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._tokens.release()

    def interrupt(self) -> None:
        self._stop.set()

    def metrics(self) -> dict[str, float]:
        return {"engine/restarts": 0.0}

    def generate(self, prompts, sampling, begun, quota):
        assert self._entered.acquire(blocking=False), "two calls at the same time"
        self._stop.clear()
        self.calls.append(([p.example.id for p in prompts], sampling.seed, self.policy_version))
        self.running.set()  # who waits for it reads `calls`
        quota = quota or Quota(len(prompts))
        lengths = [self.lengths.get(p.example.id, NUM_TOKENS) for p in prompts]
        logprobs = [group[0].logprobs_R.tolist() for group in begun]

        def are_done() -> list[bool]:
            return [len(drawn) == length for drawn, length in zip(logprobs, lengths, strict=True)]

        while not quota.is_met(are_done()) and not self._stop.is_set():
            if not self._holds or self._tokens.acquire(timeout=0.01):
                for drawn, done in zip(logprobs, are_done(), strict=True):
                    drawn += [] if done else [-float(self.policy_version)]
        self.running.clear()
        self._entered.release()
        rows = [
            (torch.arange(len(drawn)), torch.tensor(drawn), "stop" if done else "aborted")
            for drawn, done in zip(logprobs, are_done(), strict=True)
        ]
        return [[Completion(*row, text) for text in (GOOD, BAD)] for row in rows]


class Stream:
    """Prompts a0, a1, ... as PromptStream hands them out."""

    def __init__(self, make_prompt: Callable[..., Prompt]) -> None:
        self.position = 0
        self.again: dict[str, tuple[int, int]] = {}
        self._make = make_prompt

    def put_back(self, ids) -> None:
        self.again |= dict.fromkeys(ids, (1, self.position))

    def restore(self, position, again) -> None:
        self.position, self.again = position, dict(again)

    def next(self, count: int) -> list[Prompt]:
        due = [name for name, (_, at) in self.again.items() if 0 <= at <= self.position][:count]
        self.again |= {name: (self.again[name][0], -1) for name in due}
        count -= len(due)
        names = [*due, *(f"a{i}" for i in range(self.position, self.position + count))]
        self.position += count
        truth = IntervalTruth(((2.0, 4.0),))
        return [
            dataclasses.replace(
                self._make((1, 4, 4), "text"), example=Example(n, "temporal_grounding", f"{n}.mp4", "q", 8.0, truth)
            )
            for n in names
        ]


Open = Callable[..., tuple[RolloutQueue, HeldEngine, Stream]]


@pytest.fixture
def open_queue(make_prompt) -> Iterator[Open]:
    opened: list[tuple[RolloutQueue, HeldEngine]] = []

    def make(lag: int, *, holds: bool = False, num_steps: int = 5, prompts_per_step: int = 2, **rollout):
        engine, stream = HeldEngine(holds=holds), Stream(make_prompt)
        config = Config(
            rollout=RolloutConfig(group_size=2, max_policy_lag=lag, **rollout),
            train=TrainConfig(num_steps=num_steps, prompts_per_step=prompts_per_step),
        )
        tasks = make_tasks(TaskConfig())
        collector = Collector(tasks, config, SINGLE_PROCESS, lambda _: torch.zeros(0))
        queue = RolloutQueue(
            engine,  # pyright: ignore[reportArgumentType]
            collector,
            stream,  # pyright: ignore[reportArgumentType]
            lambda step: SamplingParams(2, NUM_TOKENS, seed=100 * step),
            lambda ids: [GOOD if len(row) in (NUM_TOKENS, LONG) else "cut" for row in ids],
        )
        opened.append((queue, engine))
        return queue, engine, stream

    yield make
    for queue, engine in opened:
        engine.release(1000)
        queue.close()


def ids_of(groups) -> list[str]:
    return [group.prompt.example.id for group in groups]


def note(queue: RolloutQueue, engine: HeldEngine, steps: range) -> list[tuple[list[str], list[list[float]], list[int]]]:
    """Of each step: ids, the log-probs of a group's first answer, updates between drawing and learning."""
    seen = []
    for step in steps:
        queue.fill(step)
        groups = queue.take(step)
        logprobs = [group.completions[0].logprobs_R.tolist() for group in groups]
        seen.append((ids_of(groups), logprobs, [engine.policy_version - group.policy_version for group in groups]))
        with queue.paused():
            engine.policy_version += 1
    return seen


def test_without_lag_the_newest_weights_draw_and_nothing_is_ahead(open_queue: Open):
    queue, engine, stream = open_queue(0)
    queue.fill(1)
    assert (stream.position, engine.calls) == (2, [])  # drawn when they are wanted, in the caller's thread
    assert [lags for _, _, lags in note(queue, engine, range(1, 4))] == [[0, 0]] * 3
    assert [(seed, version) for _, seed, version in engine.calls] == [(100, 1), (200, 2), (300, 3)]
    assert queue.pending() == {"pending": [], "answers": {}, "again": {}, "failed_steps": {}}
    assert queue.metrics() == {"engine/restarts": 0.0}


def test_with_lag_1_each_step_is_drawn_by_the_weights_before(open_queue: Open):
    queue, engine, stream = open_queue(1, num_steps=4)
    seen = note(queue, engine, range(1, 5))
    assert [ids for ids, _, _ in seen] == [["a0", "a1"], ["a2", "a3"], ["a4", "a5"], ["a6", "a7"]]
    assert [lags for _, _, lags in seen] == [[0, 0], [1, 1], [1, 1], [1, 1]]
    assert stream.position == 8  # nothing is read ahead of the last step
    assert queue.metrics()["sampling/policy_lag/max"] == queue.metrics()["sampling/policy_lag/mean"] == 1.0


@pytest.mark.parametrize("lag", [2, 3])
def test_no_answer_is_older_than_the_lag(open_queue: Open, lag):
    queue, engine, _ = open_queue(lag, num_steps=9)
    assert 1 <= max(lags[0] for _, _, lags in note(queue, engine, range(1, 10))) <= lag


def test_the_next_step_is_drawn_while_the_learner_works_and_weights_wait_for_it(open_queue: Open):
    queue, engine, _ = open_queue(1, holds=True)
    queue.fill(1)
    engine.release(NUM_TOKENS)
    queue.take(1)
    assert engine.running.wait(5)  # while the caller does something else
    assert engine.calls[-1][0] == ["a2", "a3"]
    threading.Timer(0.3, engine.release, (NUM_TOKENS,)).start()
    began = time.monotonic()
    with queue.paused():
        assert time.monotonic() - began > 0.25 and not engine.running.is_set()
        engine.policy_version = 2
    queue.fill(2)
    [group, _] = queue.take(2)
    assert group.completions[0].logprobs_R.tolist() == [-1.0] * NUM_TOKENS


def test_interrupted_answers_go_on_with_the_new_weights(open_queue: Open):
    queue, engine, _ = open_queue(1, holds=True, interrupt=True)
    queue.fill(1)
    engine.release(NUM_TOKENS)
    queue.take(1)
    assert engine.running.wait(5)
    engine.release(1)
    while len(engine.calls) < 2 or engine._tokens._value:
        time.sleep(0.01)
    with queue.paused():
        assert not engine.running.is_set()
        engine.policy_version = 2
    engine.release(NUM_TOKENS)
    queue.fill(2)
    [group, _] = queue.take(2)
    assert group.completions[0].logprobs_R.tolist() == [-1.0, -2.0, -2.0, -2.0]
    assert group.policy_version == 1  # of the oldest token
    assert group.completions[0].finish_reason == "stop"
    assert [version for _, _, version in engine.calls[:3]] == [1, 1, 2]


def test_what_drawing_raises_comes_out_of_take(open_queue: Open, monkeypatch):
    queue, engine, _ = open_queue(1)

    def broken(*_):
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(engine, "generate", broken)
    queue.fill(1)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        queue.take(1)


Opened = tuple[RolloutQueue, HeldEngine, Stream]


def resumed(open_queue: Open, before: Opened, lag: int, answers=None, **rollout) -> Opened:
    """A new queue that goes on with what a checkpoint of the old one keeps, by the weights of now."""
    queue, engine, stream = before
    kept = queue.pending() | ({} if answers is None else {"answers": answers})
    again, other, others_stream = open_queue(lag, **rollout)
    other.lengths, other.policy_version, others_stream.position = engine.lengths, engine.policy_version, stream.position
    again.restore(kept["pending"], kept["answers"], kept["again"], kept["failed_steps"])
    return again, other, others_stream


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_restored_queue_asks_only_for_what_was_not_drawn(open_queue: Open, interrupt):
    queue, engine, stream = before = open_queue(1, holds=True, interrupt=interrupt)
    queue.fill(1)
    engine.release(NUM_TOKENS)
    queue.take(1)
    assert engine.running.wait(5)
    engine.release(2 if interrupt else NUM_TOKENS)
    while engine._tokens._value:
        time.sleep(0.01)
    with queue.paused():
        queue._collector.failed_steps["captioning"] = 3
        stream.again["a0"] = (1, 9)
        assert queue.pending()["pending"] == [{"step": 2, "position": 2, "again": {}, "count": 2}]
        engine.policy_version = 2
        again, other, others_stream = resumed(open_queue, before, 1)
    assert others_stream.position == stream.position == 4
    assert (others_stream.again, again._collector.failed_steps) == ({"a0": (1, 9)}, {"captioning": 3})
    again.fill(2)  # step 3 is new
    groups = again.take(2)
    assert ids_of(groups) == ["a2", "a3"]
    assert groups[0].policy_version == 1
    want = [-1.0, -1.0, -2.0, -2.0] if interrupt else [-1.0] * NUM_TOKENS
    assert groups[0].completions[0].logprobs_R.tolist() == want
    assert groups[0].completions[0].text == GOOD  # it is not kept, it follows from the ids
    again.take(3)  # what is asked first without interruptions, in a thread that may not have begun until now
    asked = [ids for ids, _, _ in other.calls]
    assert asked[0] == (["a2", "a3"] if interrupt else ["a4", "a5"])


def test_further_prompts_for_groups_without_a_signal_come_before_later_steps(open_queue: Open, monkeypatch):
    queue, engine, stream = open_queue(2, holds=True, max_resample_rounds=1)
    monkeypatch.setattr(queue._collector.tasks["temporal_grounding"], "score", _flat_below("a4"))
    queue.fill(1)
    engine.release(NUM_TOKENS)
    threading.Timer(0.3, engine.release, (3 * NUM_TOKENS,)).start()  # meanwhile step 2 is drawn, and step 3 waits
    assert ids_of(queue.take(1)) == ["a6", "a7"]  # a0 and a1 taught nothing; a2 to a5 are of steps 2 and 3
    assert stream.position == 8
    engine.release(100)
    assert queue._steps[1][1].done.result(5).groups
    assert [ids[0] for ids, _, _ in engine.calls[:4]] == ["a0", "a2", "a6", "a4"]


def test_examples_without_a_score_are_given_back(open_queue: Open, monkeypatch):
    queue, _, stream = open_queue(0)

    def only_a1(examples, answers):
        if {example.id for example in examples} != {"a1"}:
            raise ConnectionError("the judge is down")
        return {"iou": [1.0, 0.0]}

    monkeypatch.setattr(queue._collector.tasks["temporal_grounding"], "score", only_a1)
    queue.fill(1)
    assert ids_of(queue.take(1)) == ["a1"]
    assert stream.again == {"a0": (1, 2)}
    assert queue.pending()["again"] == {"a0": (1, 2)}


def _flat_below(first: str):
    def score(examples, answers):
        return {"iou": [float(a == GOOD) if e.id >= first else 0.0 for e, a in zip(examples, answers, strict=True)]}

    return score


@pytest.mark.parametrize("lag", [0, 1])
def test_groups_that_are_not_finished_go_on_in_the_next_step(open_queue: Open, lag):
    queue, engine, stream = open_queue(lag, over_provision=0.5)
    engine.lengths = LENGTHS
    seen = note(queue, engine, range(1, 6))
    assert [ids for ids, _, _ in seen] == STEPS and stream.position == 10  # nothing is lost, nothing left
    if lag == 0:
        assert [lags for _, _, lags in seen] == [[0, 0], [1, 0], [1, 0], [1, 0], [1, 0]]
        assert [logprobs[0] for _, logprobs, _ in seen][1:3] == [[-1.0] * 4 + [-2.0] * 3, [-2.0] * 4 + [-3.0] * 3]
        assert queue.metrics()["sampling/policy_lag/mean"] == 0.5 and queue.metrics()["sampling/policy_lag/max"] == 1
    assert all(max(lags) <= lag + 1 for _, _, lags in seen)
    assert len(engine.calls) == 5


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_restored_queue_goes_on_with_what_a_step_left(open_queue: Open, stop, lag):
    whole, engine, _ = open_queue(lag, over_provision=0.5)
    engine.lengths = LENGTHS
    want = note(whole, engine, range(1, 6))
    queue, engine, _ = before = open_queue(lag, over_provision=0.5)
    engine.lengths = LENGTHS
    assert note(queue, engine, range(1, stop + 1)) == want[:stop]
    with queue.paused():
        again, other, _ = resumed(open_queue, before, lag, over_provision=0.5)
    assert note(again, other, range(stop + 1, 6)) == want[stop:]


def test_answers_go_on_for_their_own_prompt_when_another_s_video_cannot_be_read_any_more(open_queue: Open, monkeypatch):
    before = open_queue(0, over_provision=0.5)
    before[1].lengths = LENGTHS
    note(*before[:2], range(1, 2))
    read = Stream.next
    monkeypatch.setattr(Stream, "next", lambda *args: [p for p in read(*args) if p.example.id != "a0"])
    again, other, _ = resumed(open_queue, before, 0, over_provision=0.5)
    [(ids, logprobs, _)] = note(again, other, range(2, 3))
    assert (ids, other.calls[0][0]) == (["a1", "a4"], ["a1", "a3", "a4"])  # a1 was the second of step 1
    assert logprobs == [[-1.0] * 4 + [-2.0] * 3, [-2.0] * 4]


def test_an_example_that_comes_twice_in_a_step_keeps_its_answers_apart(make_prompt):
    prompts = [make_prompt((1, 4, 4), name) for name in "aba"]
    first, second, other = (Answers(prompts[i].example.id, [], version) for i, version in ((0, 1), (0, 2), (1, 3)))
    assert matched([*prompts, *prompts], [first, other, second]) == [first, other, second, None, None, None]


@pytest.mark.parametrize("answers", [{}, {"1.tail.sizes": torch.ones(1)}], ids=["other ranks", "another version's"])
def test_without_its_answers_what_a_step_left_comes_again(open_queue: Open, answers):
    before = open_queue(0, over_provision=0.5)
    before[1].lengths = LENGTHS
    note(*before[:2], range(1, 2))
    before[1].lengths = {}
    again, other, _ = resumed(open_queue, before, 0, answers, over_provision=0.5)
    assert [ids for ids, _, _ in note(again, other, range(2, 4))] == [["a1", "a3"], ["a4", "a5"]]


@pytest.mark.parametrize(("lag", "over_provision"), [(1, 0.0), (0, 0.5), (1, 0.5)])
def test_answers_older_than_a_resumed_run_allows_are_drawn_anew(open_queue: Open, lag, over_provision):
    queue, engine, _ = before = open_queue(lag, over_provision=over_provision)
    engine.lengths = LENGTHS
    note(queue, engine, range(1, 3))
    again, other, _ = resumed(open_queue, before, 0)
    seen = note(again, other, range(3, 6))
    assert all(lags == [0] * len(lags) for _, _, lags in seen)
    learned = [*STEPS[0], *STEPS[1]] if over_provision else ["a0", "a1", "a2", "a3"]
    learned += [name for ids, _, _ in seen for name in ids]
    assert sorted(learned) == sorted(f"a{i}" for i in range(len(learned)))  # nothing is lost or learned from twice


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("holds", [True, False])  # one step is drawn, or all of them
def test_steps_that_were_further_ahead_than_a_resumed_run_allows(open_queue: Open, lag, holds):
    queue, engine, _ = before = open_queue(4, holds=holds, interrupt=True)
    queue.fill(1)
    engine.release(NUM_TOKENS)
    queue.take(1)
    wait([] if holds else [drawing.done for _, drawing in queue._steps])
    with queue.paused():
        engine.policy_version = 2
        again, other, _ = resumed(open_queue, before, lag)
    assert max(lags for _, _, [lags, _] in note(again, other, range(2, 6))) == lag


def test_the_share_is_rounded_up_and_the_only_step_draws_no_more_than_it_needs(open_queue: Open):
    queue, engine, stream = open_queue(0, num_steps=1, prompts_per_step=5, over_provision=0.2)
    assert [len(ids) for ids, _, _ in note(queue, engine, range(1, 2))] == [5] and stream.position == 5
    queue, engine, stream = open_queue(0, num_steps=9, prompts_per_step=5, over_provision=0.3)
    queue.fill(1)
    assert stream.position == 7
