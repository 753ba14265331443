"""Two real workers of one engine, reached over TCP as `vcr1-fast serve` runs them.

Prompts go to both, weights by one broadcast to both; one of them is killed in the middle of a call. Over TCP they
answer as a child of the trainer does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from vcr1_kernels import patchify

from tests.conftest import ModelFactory
from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.conftest import MakePrompt
from tests.rollout.sglang.parity import BOUND, difference, disturb
from tests.rollout.sglang.test_delivery_real import delivering
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.rollout_key import VARIABLE
from vcr1_fast.rollout.serve import Server
from vcr1_fast.rollout.sgl.delivery import Broadcast
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import Prompt, SamplingParams
from vcr1_fast.video.pixel_bytes import pack

KEY = b"k" * 32
GROUP_SIZE = 3
SHORT = SamplingParams(GROUP_SIZE, 8)
GREEDY = SamplingParams(2, 16, temperature=0.0)
LONG = SamplingParams(GROUP_SIZE, 300)  # takes seconds, in which a worker can be killed


@dataclass(frozen=True)
class Pair:
    """An engine with two workers, and the node that runs them."""

    engine: SGLangEngine
    server: Server
    posted: list[tuple[int, str, int]]  # each request sent: worker, grid of the video, completions asked for

    def groups(self) -> list[str]:
        """Of the broadcast, by worker."""
        return [seat.group for seat in self.engine._workers.seats]

    def num_members(self) -> int:
        """Of the group that the learner is in."""
        delivery = self.engine._workers._delivery
        assert isinstance(delivery, Broadcast) and delivery._group is not None
        return delivery._group.size

    def worst(self, policy: PolicyModel, prompts: list[Prompt], sampling: SamplingParams = SHORT) -> float:
        """Largest |engine - learner| of all answers to the prompts."""
        self.posted.clear()
        answers = self.engine.generate(prompts, sampling)
        assert [len(group) for group in answers] == [GROUP_SIZE] * len(prompts)
        largest, spread = difference(policy, prompts, answers)
        assert spread > 0.5  # agreement means something
        return largest


@pytest.fixture(scope="module")
def pair(
    settings: SGLangConfig,
    random_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    logs = tmp_path_factory.mktemp("serve")
    server = Server(settings, random_folder, bind=("127.0.0.1", 0), gpus=[None, None], key=KEY, logs=logs)
    try:
        server.start(settings.start_timeout_s)
        addresses = tuple(show(station.address) for station in server.stations)
        config = replace(settings, placement="disaggregated", addresses=addresses, weights="broadcast")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(VARIABLE, KEY.hex())
            engine = SGLangEngine(random_folder, tiny_tokenizer, config)
        try:
            yield Pair(engine, server, posts_of(engine))
        finally:
            pids = [station.child.pid for station in server.stations]
            engine.close()
    finally:
        server.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def posts_of(engine: SGLangEngine) -> list[tuple[int, str, int]]:
    """Filled with what the engine sends from now on."""
    posted: list[tuple[int, str, int]] = []
    for index, seat in enumerate(engine._workers.seats):

        def noted(kind, fields, tensors, *, index=index, send=seat.worker.send) -> None:
            if kind == "generate":
                posted.append((index, str(fields["media"][0]["grid_thw"]), len(fields["begun_lengths"])))
            send(kind, fields, tensors)

        seat.worker.send = noted
    return posted


@pytest.fixture
def policy(make_tiny_model: ModelFactory) -> PolicyModel:
    return policy_of(make_tiny_model(seed=41))


@pytest.fixture
def six(make_prompt: MakePrompt) -> list[Prompt]:
    """Prompts with videos of 8 and 24 tokens, each another one."""
    return [
        make_prompt(grid, f"{number} {text}", second_per_grid_s, number)
        for number in range(3)
        for grid, text, second_per_grid_s in (((2, 4, 4), "when", 1.0), ((3, 8, 4), "where", 0.7))
    ]


@pytest.fixture
def framed(make_prompt: MakePrompt) -> list[Prompt]:
    """With patches of real frames, which travel as bytes."""
    generator = torch.Generator().manual_seed(3)

    def with_frames(prompt: Prompt) -> Prompt:
        t, h, w = prompt.media[0].grid_thw
        frames = torch.randint(0, 256, (2 * t, 14 * h, 14 * w, 3), dtype=torch.uint8, generator=generator)
        return replace(prompt, media=(replace(prompt.media[0], values_PC=patchify(frames, torch.float32)),))

    made = [with_frames(make_prompt((2, 4, 4), "when", 1.0, 1)), with_frames(make_prompt((5, 8, 4), "where", 0.7, 2))]
    assert all("bytes_PC" in pack({"values_PC": prompt.media[0].values_PC}) for prompt in made)
    return made


@pytest.mark.slow
def test_over_tcp_they_answer_as_a_child_does(pair, random_engine, make_tiny_model, framed):
    """Also the weights come over TCP alone, without a group."""
    weights = make_tiny_model(seed=6).state_dict()
    random_engine.load_weights(weights.items(), 50)
    with delivering(pair.engine, "shared_memory"):
        pair.engine.load_weights(weights.items(), 50)
        remote = pair.engine.generate(framed, GREEDY)
    for mine, theirs in zip(random_engine.generate(framed, GREEDY), remote, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.token_ids_R.tolist() == b.token_ids_R.tolist()
            # the same engine, weights and pixels; only what is batched together may differ
            torch.testing.assert_close(a.logprobs_R, b.logprobs_R, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_prompts_go_to_both_and_one_broadcast_feeds_both(pair, policy, six):
    sync = WeightSync(policy, pair.engine)
    for update in range(3):
        sync.push()  # after the first, every checksum is compared inside both
        assert pair.worst(policy, six) < BOUND
        # in turn, as both have equally many when each is handed out; a group is never shared out
        assert pair.posted == [(i % 2, str(p.media[0].grid_thw), GROUP_SIZE) for i, p in enumerate(six)]
        disturb(policy, update)
    for worker in range(2):  # not pushed: stale weights would be seen in either
        assert pair.worst(policy, six[worker::2]) > 100 * BOUND
    assert pair.num_members() == 3
    assert len(set(pair.groups())) == 1


@pytest.mark.slow
def test_a_worker_killed_in_mid_call_answers_with_the_current_weights_and_joins_a_new_group(pair, policy, six):
    sync, seats, killed = WeightSync(policy, pair.engine), pair.engine._workers.seats, pair.server.stations[1]
    sync.push()
    (old,), restarts = set(pair.groups()), pair.engine.num_restarts
    at_work: list[int] = []

    def kill() -> None:
        time.sleep(0.3)  # what it had answered before it was stopped has come
        at_work.append(len(seats[1].requests))
        os.kill(killed.child.pid, signal.SIGKILL)

    def stopped_by_its_last_request(kind, fields, tensors, *, send=seats[1].worker.send) -> None:
        """From here on it answers nothing, however fast it is: all it is asked for is at work."""
        send(kind, fields, tensors)
        if kind == "generate" and len(pair.posted) == len(six):
            os.kill(killed.child.pid, signal.SIGSTOP)
            killer.start()

    pair.posted.clear()
    killer = threading.Thread(target=kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seats[1].worker, "send", stopped_by_its_last_request)
        assert pair.worst(policy, six, LONG) < BOUND
    killer.join()
    assert at_work[0] > 0
    assert len(pair.posted) == len(six) + at_work[0]  # what it had was asked for again, and nothing else
    assert pair.engine.num_restarts == restarts + 1
    assert killed.num_workers == 2 and killed.facts["sglang"] == seats[1].worker.version
    assert pair.groups() == [old, ""]
    assert pair.worst(policy, six) < BOUND  # from the copy in host memory
    assert {worker for worker, _, _ in pair.posted} == {0, 1}

    disturb(policy, 7)
    sync.push()
    assert pair.worst(policy, six) < BOUND
    assert pair.num_members() == 3
    (new,) = set(pair.groups())
    assert new not in ("", old)
