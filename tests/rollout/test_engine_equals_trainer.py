"""The engine's log-probs are the trainer's: same ids, same weights, packed row against KV-cache decoding."""

import copy

import pytest
import torch

from tests.rollout.timed_prompt import timed_prompt
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.settings.config import ModelConfig
from vcr1_fast.types import RolloutGroup, SamplingParams


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_within_1e_4(tiny_model, tiny_tokenizer, make_prompt, temperature):
    policy = PolicyModel(copy.deepcopy(tiny_model), ModelConfig(), torch.float32)
    engine = LocalEngine(tiny_model, tiny_tokenizer)
    prompts = [
        make_prompt((2, 4, 4), "when does it bark", second_per_grid_s=1.0, seed=1),
        make_prompt((3, 8, 4), "where", second_per_grid_s=0.7, seed=2),
        timed_prompt(tiny_tokenizer),
    ]
    answers = engine.generate(prompts, SamplingParams(5, 24, temperature, seed=3))
    groups = [RolloutGroup(p, tuple(completions), 1) for p, completions in zip(prompts, answers, strict=True)]
    batch = pack(groups, [[1.0] * 5] * 3)
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), temperature)
    assert batch.engine_logprob_N.std() > 0.5  # far from uniform, so agreement means something
    assert (logprob_N - batch.engine_logprob_N).abs().max() < 1e-4
