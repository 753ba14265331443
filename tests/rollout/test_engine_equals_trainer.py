"""The engine's log-probs are the trainer's: same ids, same weights, packed row against KV-cache decoding."""

import copy
import dataclasses

import pytest
import torch

from tests.conftest import make_example, make_patches
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.settings.config import ModelConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Patches, Prompt, RolloutGroup, SamplingParams


def timed_prompt(patches: Patches, tokenizer) -> Prompt:
    """The times of its three pairs of frames are written before them."""
    task = make_tasks(TaskConfig(), ["temporal_grounding"])
    timed = dataclasses.replace(patches, pair_times_s=(0.5, 1.5, 2.5))
    return PromptBuilder(tokenizer, task, lambda _: timed, writes_times=True).build(
        make_example("timed", task="temporal_grounding")
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_within_1e_4(tiny_model, tiny_tokenizer, make_prompt, temperature):
    policy = PolicyModel(copy.deepcopy(tiny_model), ModelConfig(), torch.float32)
    engine = LocalEngine(tiny_model, tiny_tokenizer)
    prompts = [
        make_prompt((2, 4, 4), "when does it bark", second_per_grid_s=1.0, seed=1),
        make_prompt((3, 8, 4), "where", second_per_grid_s=0.7, seed=2),
        timed_prompt(make_patches((3, 4, 4), 1.0, 4), tiny_tokenizer),
    ]
    answers = engine.generate(prompts, SamplingParams(5, 24, temperature, seed=3))
    groups = [RolloutGroup(p, tuple(completions), 1) for p, completions in zip(prompts, answers, strict=True)]
    batch = pack(groups, [[1.0] * 5] * 3)
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), temperature)
    assert batch.engine_logprob_N.std() > 0.5  # far from uniform, so agreement means something
    assert (logprob_N - batch.engine_logprob_N).abs().max() < 1e-4
