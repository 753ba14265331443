"""The real engine cut short in the middle of its answers: they go on under new weights, each token with the log-prob of
the weights that drew it."""

from __future__ import annotations

import threading

import torch

from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.parity import BOUND, short_and_long
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.rollout.engine import Quota, is_done
from vcr1_fast.types import Completion, RolloutGroup, SamplingParams

SAMPLING = SamplingParams(4, 192)


def logprobs_by(policy: PolicyModel, prompt, completions: list[Completion]) -> list[torch.Tensor]:
    batch = pack([RolloutGroup(prompt, tuple(completions), 0)], [[1.0] * len(completions)])
    with torch.no_grad():
        logprob_N, _ = policy(policy.device_batch(batch), 1.0)
    return list(logprob_N.split([c.num_tokens for c in completions]))


def cut_in_the_middle(engine, prompts) -> list[list[Completion]]:
    """Answers of which some have tokens and are not finished.

    How long the first token takes, and the last, depends on the machine and what else it does: the time until the cut
    grows while no answer has begun, and shrinks when all have ended."""
    delay_s = 0.1
    for _ in range(40):
        got: list[list[list[Completion]]] = []
        thread = threading.Thread(target=lambda got=got: got.append(engine.generate(prompts, SAMPLING)))
        thread.start()
        thread.join(delay_s)
        while thread.is_alive():
            engine.interrupt()
            thread.join(0.1)
        [answers] = got
        cut = [c for group in answers for c in group if c.finish_reason == "aborted"]
        if any(c.num_tokens > 0 for c in cut):
            return answers
        delay_s *= 1.3 if cut else 0.85
    raise AssertionError(f"no answer was cut in the middle, the last after {delay_s:g} s")


def test_each_token_has_the_log_prob_of_the_weights_that_drew_it(random_engine, make_tiny_model, make_prompt):
    old, new = (policy_of(make_tiny_model(seed=seed)) for seed in (21, 22))
    prompts = short_and_long(make_prompt)[:2]
    random_engine.load_weights(old.hf.state_dict().items(), 300)
    restarts = random_engine.num_restarts  # of tests before this one
    begun = cut_in_the_middle(random_engine, prompts)
    random_engine.load_weights(new.hf.state_dict().items(), 301)
    some = random_engine.generate(prompts, SAMPLING, begun, Quota(1))
    assert any(map(is_done, some))
    whole = random_engine.generate(prompts, SAMPLING, some)
    assert whole[0 if is_done(some[0]) else 1] == some[0 if is_done(some[0]) else 1]
    apart = []
    for prompt, group, before in zip(prompts, whole, begun, strict=True):
        by_old, by_new = logprobs_by(old, prompt, group), logprobs_by(new, prompt, group)
        for row, part, old_R, new_R in zip(group, before, by_old, by_new, strict=True):
            split = part.num_tokens
            assert row.finish_reason != "aborted" and row.num_tokens <= SAMPLING.max_new_tokens
            assert row.token_ids_R[:split].tolist() == part.token_ids_R.tolist()
            assert (row.logprobs_R[:split] - old_R[:split]).abs().sum() <= BOUND * split
            rest = row.num_tokens - split
            assert (row.logprobs_R[split:] - new_R[split:]).abs().sum() <= BOUND * rest
            apart += (old_R - new_R)[split:].abs().tolist()
    assert max(apart) > 100 * BOUND  # the two can be told apart
    assert random_engine.num_restarts == restarts
