"""The four ranks of test_hybrid_sharding.py, two nodes of two: one process that imports everything and then forks.

Arguments: the model's folder, and the run's.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.learner.conftest import random_group
from tests.learner.test_hybrid_sharding import LENGTHS, hybrid_config, state_of
from tests.recording_engine import RecordingEngine
from tests.tiny_policy import fork_ranks
from vcr1_fast.learner.sharding import exit_rank, init_distributed, named_weights, shutdown, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.weight_sync import WeightSync

NUM_RANKS = 4


def main(model: str, run: str) -> None:
    world = init_distributed("cpu")
    config = hybrid_config(Path(model))
    groups = [random_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)][world.rank :: NUM_RANKS]
    learner = Learner(config, world, 10)
    for weight in learner.policy.parameters():
        assert isinstance(weight, DTensor) and weight.placements == (Replicate(), Shard(0))
        assert weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    reports = [report for _ in range(2) for report in learner.update_grpo(groups)]
    folder = save_checkpoint(run, *parts(learner), RunState(2, 0, 0, 0, "", ""), world, keep=1)
    saved = state_of(learner)

    engine = RecordingEngine()
    WeightSync(learner.policy, engine).push()
    for name, weight in named_weights(learner.policy.hf).items():
        assert torch.equal(engine.loaded[name], whole_tensor(weight)), name

    flat = Learner(replace(config, train=replace(config.train, replicate=1)), world, 10)
    load_checkpoint(folder, *parts(flat), world)
    loaded = state_of(flat)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    if world.is_main:
        torch.save({"saved": saved, "norms": [report.grad_norm for report in reports]}, Path(run) / "ranks.pt")
    shutdown(world)
    exit_rank(0)


def parts(learner: Learner):
    return learner.policy, learner.optimizer, learner.schedule


if __name__ == "__main__":
    fork_ranks(NUM_RANKS, main)
