"""Adapters alone to the real SGLang engine: log-probs are those of the learner, which never adds them up."""

import os
import signal

import pytest
import torch

from tests.rollout.sglang.parity import BOUND, difference, short_and_long
from tests.rollout.sglang.test_delivery_real import delivering
from vcr1_fast.learner.lora import adapter_factors, add_adapters
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.rollout.sgl.adapters import Adapters
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import LoRAConfig, ModelConfig
from vcr1_fast.types import SamplingParams

LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture
def policy(make_tiny_model) -> PolicyModel:
    hf = make_tiny_model(seed=31)
    add_adapters(hf, LORA, 0)
    return PolicyModel(hf, ModelConfig(), torch.float32)


def train(policy: PolicyModel, seed: int) -> None:
    """Every factor moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter_factors(policy.hf).values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator))


@pytest.mark.parametrize("way", ["shared_memory", "broadcast", "disk"])
def test_parity_after_updates_and_after_a_kill(random_engine, policy, make_prompt, way, tmp_path, monkeypatch):
    prompts = short_and_long(make_prompt)[:2]

    def worst() -> float:
        largest, spread = difference(policy, prompts, random_engine.generate(prompts, SamplingParams(2, 8)))
        assert spread > 0.5  # agreement means something
        return largest

    workers = random_engine._workers
    with delivering(random_engine, way, tmp_path):
        monkeypatch.setattr(workers, "_adapters", Adapters(1 << 20, torch.float32, LORA.scale))
        sync = WeightSync(policy, random_engine, adapters_only=True)
        first = sync.push()  # every checksum is compared inside SGLang
        assert worst() < BOUND
        for seed in range(3):  # sums of sums would drift
            train(policy, seed)
            assert worst() > 10 * BOUND  # not pushed yet
            report = sync.push()
            assert worst() < BOUND
            assert report.num_bytes < first.num_bytes / 3
            assert random_engine.policy_version == report.policy_version
        if way == "shared_memory":
            os.kill(workers.seats[0].worker.pid, signal.SIGKILL)
            assert worst() < BOUND  # matrices and factors again, from the copies in host memory
            train(policy, 9)
            sync.push()
            assert worst() < BOUND
