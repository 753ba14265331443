"""The engine's log-probs are the trainer's: same ids, same weights, packed row against KV-cache decoding."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.learner.conftest import with_large_weights
from tests.rollout.sampled_policy import policy_of
from tests.rollout.timed_prompt import timed_prompt
from vcr1_fast.learner.packing import pack
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.tiny.architecture import tiny_config, untrained_model
from vcr1_fast.tiny.build import build_tiny_tokenizer
from vcr1_fast.types import Prompt, RolloutGroup, SamplingParams
from vcr1_fast.video.formats import QWEN3_VL


def assert_alike(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], temperature: float) -> None:
    policy = policy_of(copy.deepcopy(model))
    engine = LocalEngine(model, tokenizer)
    answers = engine.generate(prompts, SamplingParams(5, 24, temperature, seed=3))
    groups = [RolloutGroup(p, tuple(completions), 1) for p, completions in zip(prompts, answers, strict=True)]
    batch = pack(groups, [[1.0] * 5] * len(prompts))
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), temperature)
    assert batch.engine_logprob_N.std() > 0.5  # far from uniform, so agreement means something
    assert (logprob_N - batch.engine_logprob_N).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_agree_within_1e_4(tiny_model, tiny_tokenizer, make_prompt, temperature):
    prompts = [
        make_prompt((2, 4, 4), "when does it bark", second_per_grid_s=1.0, seed=1),
        make_prompt((3, 8, 4), "where", second_per_grid_s=0.7, seed=2),
        timed_prompt(tiny_tokenizer),
    ]
    assert_alike(tiny_model, tiny_tokenizer, prompts, temperature)


def test_those_of_qwen3_vl_too_with_its_features_for_inner_layers():
    """Prompts of several lengths: the prefill's rows are padded, and the places of video tokens count through all."""
    tokenizer = build_tiny_tokenizer()
    model = with_large_weights(untrained_model(tiny_config(tokenizer, "qwen3_vl"), 0), 0)
    grids = ((3, 4, 4), (2, 4, 8), (1, 6, 6))
    prompts = [timed_prompt(tokenizer, grid, seed, QWEN3_VL) for seed, grid in enumerate(grids)]
    assert_alike(model, tokenizer, prompts, 1.0)
