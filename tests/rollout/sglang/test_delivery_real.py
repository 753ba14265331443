"""Each way that weights reach the real SGLang engine: log-prob parity before and after, and frozen parts.

The ways are put into one engine that other tests use, too: what differs lies in the messages.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.parity import BOUND, difference, disturb, short_and_long
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.rollout.sgl.delivery import make_delivery
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.types import SamplingParams


@contextlib.contextmanager
def delivering(engine: SGLangEngine, way: str) -> Iterator[None]:
    """The engine as if it had been made with `rollout.sglang.weights` and had no weights yet."""
    workers = engine._workers
    kept = workers._delivery, workers._table
    config = replace(engine.config, weights=way)
    workers._delivery = make_delivery(config, torch.float32, torch.device("cpu"))
    workers._table = WeightTable()
    for seat in workers.seats:
        seat.is_checked = False
    try:
        yield
    finally:
        workers._delivery.close()
        workers._delivery, workers._table = kept
        for seat in workers.seats:
            seat.is_checked = False


@pytest.fixture
def policy(make_tiny_model) -> PolicyModel:
    return policy_of(make_tiny_model(seed=21))


def worst(engine, policy, make_prompt) -> float:
    prompts = short_and_long(make_prompt)[:2]
    largest, spread = difference(policy, prompts, engine.generate(prompts, SamplingParams(2, 8)))
    assert spread > 0.5  # agreement means something
    return largest


def test_parity_before_and_after_updates_without_the_frozen_tower(random_engine, policy, make_prompt):
    policy.hf.model.visual.requires_grad_(False)
    with delivering(random_engine, "broadcast"):
        sync = WeightSync(policy, random_engine)
        first = sync.push()  # every checksum is compared inside SGLang
        assert worst(random_engine, policy, make_prompt) < BOUND
        with torch.no_grad():
            for weight in policy.parameters():
                if weight.requires_grad:
                    weight.mul_(1.1)
        assert worst(random_engine, policy, make_prompt) > 10 * BOUND  # not pushed yet
        assert sync.push().num_bytes < first.num_bytes
        assert worst(random_engine, policy, make_prompt) < BOUND
        assert random_engine.policy_version == 2


def test_released_memory_comes_back_with_the_next_whole_load(random_engine, policy, make_prompt, monkeypatch):
    """On a CPU SGLang releases nothing, but takes the calls in the right order only: it fails for a tag that it has."""
    monkeypatch.setattr(random_engine, "config", replace(random_engine.config, release_memory=True))
    sync = WeightSync(policy, random_engine, skips_frozen=False)
    policy.hf.model.visual.requires_grad_(False)
    sync.push()
    for _ in range(2):
        random_engine.release_memory()
        with pytest.raises(RuntimeError, match="memory is released"):
            random_engine.generate([make_prompt((2, 4, 4), "when")], SamplingParams(1, 2))
        with pytest.raises(ValueError, match="must name every weight"):
            random_engine.load_weights([("lm_head.weight", policy.hf.lm_head.weight)], 9)
        disturb(policy, 2)
        sync.push()
        assert worst(random_engine, policy, make_prompt) < BOUND
