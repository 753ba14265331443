"""The comparison of engine and learner before the first step: passes where they agree, fails with the numbers."""

import copy
import dataclasses

import pytest
import torch

from tests.conftest import build_model, build_tokenizer, make_example, make_patches
from tests.ranks import on_ranks
from tests.rollout.sampled_policy import policy_of
from vcr1_fast.learner.sharding import World, shard
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.rollout.parity import MAX_NEW_TOKENS, NUM_COMPLETIONS, ParityError, check_parity, warn_of_gap
from vcr1_fast.rollout.sampling import sample_tokens
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import Config, RolloutConfig, TaskConfig
from vcr1_fast.tasks import make_tasks

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def pair(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model(seed=4)
    policy = policy_of(copy.deepcopy(model))
    engine = LocalEngine(model, tiny_tokenizer)
    WeightSync(policy, engine).push()
    return engine, policy


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 5, 0.8)]
)
def test_passes_where_both_compute_the_same(pair, make_prompt, temperature, top_k, top_p):
    engine, policy = pair
    config = RolloutConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    report = check_parity(engine, policy, make_prompt((2, 4, 4), "when"), config, torch.float32, ALONE)
    assert 0 < report.mean_gap < 1e-5 < report.max_mean_gap == 1e-3
    assert report.mean_gap <= report.max_gap < 1e-4
    assert NUM_COMPLETIONS <= report.num_tokens <= NUM_COMPLETIONS * MAX_NEW_TOKENS
    assert f"{report.mean_gap:.1e} nats" in str(report)
    ids = torch.arange(40, 60)
    text = dataclasses.replace(make_prompt((2, 4, 4), "when"), token_ids_L=ids, media=())
    text = dataclasses.replace(text, position_ids_3L=torch.arange(20).expand(3, -1))
    assert check_parity(engine, policy, text, config, torch.float32, ALONE).max_gap < 1e-4


@pytest.mark.parametrize("name", ["model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"])
def test_one_wrong_weight_fails_with_the_numbers(pair, make_prompt, name):
    engine, policy = pair
    with torch.no_grad():
        engine.model.get_parameter(name).mul_(1.5)
    with pytest.raises(ParityError, match=r"differ by \d\.\de[+-]\d\d nats .* policy version 1: .*max_logprob_gap"):
        check_parity(engine, policy, make_prompt((2, 4, 4), "when"), RolloutConfig(), torch.float32, ALONE)


def test_the_bound_is_the_settings_or_follows_the_precision(pair, make_prompt):
    """An error of rounding passes in bfloat16, not in float32; NaN never does."""
    engine, policy = pair
    prompt = make_prompt((2, 4, 4), "when")
    with torch.no_grad():
        engine.model.get_parameter("model.language_model.norm.weight").mul_(1.01)
    report = check_parity(engine, policy, prompt, RolloutConfig(), torch.bfloat16, ALONE)
    assert 1e-3 < report.mean_gap < report.max_mean_gap == 0.1
    with pytest.raises(ParityError):
        check_parity(engine, policy, prompt, RolloutConfig(), torch.float32, ALONE)
    check_parity(engine, policy, prompt, RolloutConfig(max_logprob_gap=0.05), torch.float32, ALONE)
    with torch.no_grad():
        policy.hf.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ParityError, match="nan"):
        check_parity(engine, policy, prompt, RolloutConfig(max_logprob_gap=1e9), torch.float32, ALONE)


def test_an_engine_that_renormalises_what_top_k_keeps_is_found(pair, make_prompt, monkeypatch):
    engine, policy = pair

    def renormalising(logits_BV, uniform_B, sampling, suppressed_ids, seen_BV):
        token_B, logprob_B = sample_tokens(logits_BV, uniform_B, sampling, suppressed_ids, seen_BV)
        drawn_BV = logits_BV.index_fill(1, suppressed_ids, -torch.inf)
        kept_BK = drawn_BV.topk(sampling.top_k).values
        return token_B, logprob_B - (kept_BK.logsumexp(1) - drawn_BV.logsumexp(1))

    monkeypatch.setattr("vcr1_fast.rollout.local_engine.sample_tokens", renormalising)
    with pytest.raises(ParityError, match="differ by"):
        check_parity(engine, policy, make_prompt((2, 4, 4), "when"), RolloutConfig(top_k=3), torch.float32, ALONE)


def compare_with_one_wrong_engine(world: World) -> None:
    """A sharded learner, and the engine of rank 1 holds a wrong weight."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=3)
    policy, engine = policy_of(model), LocalEngine(copy.deepcopy(model), tokenizer)
    shard(policy, world, torch.float32)
    builder = PromptBuilder(tokenizer, make_tasks(TaskConfig()), lambda _: make_patches((1, 4, 4)))
    prompt = builder.build(make_example(f"of-rank-{world.rank}", task="temporal_grounding"))
    WeightSync(policy, engine).push()
    report = check_parity(engine, policy, prompt, RolloutConfig(), torch.float32, world)
    assert report is not None and report.mean_gap < 1e-4
    if world.rank == 1:
        with torch.no_grad():
            engine.model.lm_head.weight[0].add_(1.0)
    with pytest.raises(ParityError if world.rank == 1 else OSError, match="differ by" if world.rank else "rank 1 fail"):
        check_parity(engine, policy, prompt, RolloutConfig(), torch.float32, world)


def test_two_ranks_fail_together_when_one_engine_is_wrong():
    on_ranks(compare_with_one_wrong_engine)


def test_a_gap_in_the_middle_of_a_run_is_told(capsys):
    metrics = {"sampling/sampling_logp_difference/mean": 0.02}
    warn_of_gap(7, metrics, Config(), torch.float32)
    assert "step 7: the engine's log-probs are 2.0e-02 nats from the learner's" in capsys.readouterr().err
    warn_of_gap(7, metrics, Config(), torch.bfloat16)
    warn_of_gap(7, metrics, Config(rollout=RolloutConfig(max_policy_lag=1)), torch.float32)  # other weights drew
    assert capsys.readouterr().err == ""


def test_without_a_prompt_nothing_is_compared(pair):
    engine, policy = pair
    assert check_parity(engine, policy, None, RolloutConfig(), torch.float32, ALONE) is None
