"""Run by test_parity on each of two ranks: a sharded learner, and one of the two engines holds a wrong weight."""

import copy

import pytest
import torch

from tests.conftest import build_model, build_tokenizer, make_example, make_patches
from tests.rollout.sampled_policy import policy_of
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shard, shutdown
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.rollout.parity import ParityError, check_parity
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import RolloutConfig, TaskConfig
from vcr1_fast.tasks import make_tasks


def main() -> None:
    world = init_distributed("cpu")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=3)
    policy = policy_of(model)
    engine = LocalEngine(copy.deepcopy(model), tokenizer)
    shard(policy, world, torch.float32)
    builder = PromptBuilder(tokenizer, make_tasks(TaskConfig()), lambda _: make_patches((1, 4, 4)))
    prompt = builder.build(make_example(f"of-rank-{world.rank}", task="temporal_grounding"))
    WeightSync(policy, engine).push()
    report = check_parity(engine, policy, prompt, RolloutConfig(), torch.float32, world)
    assert report.mean_gap < 1e-4
    if world.rank == 1:
        with torch.no_grad():
            engine.model.lm_head.weight[0].add_(1.0)
    with pytest.raises(ParityError if world.rank == 1 else OSError, match="differ by" if world.rank else "rank 1 fail"):
        check_parity(engine, policy, prompt, RolloutConfig(), torch.float32, world)
    shutdown(world)
    exit_rank(0)


main()
