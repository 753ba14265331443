"""One rank of test_lora.py: an update of adapters with a KL term, and what a push carries after it."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.learner.conftest import random_group
from tests.learner.test_lora import with_lora
from tests.learner.test_step import LENGTHS, make_config
from tests.recording_engine import RecordingEngine
from vcr1_fast.learner.lora import adapter_factors
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.weight_sync import WeightSync


def main(model: str, out: str, dtype: str) -> None:
    world = init_distributed("cpu")
    groups = [random_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)]
    config = with_lora(make_config(Path(model), 1, beta=0.04))
    config = replace(config, model=replace(config.model, compute_dtype=dtype))
    learner = Learner(config, world, 10)
    gradients: dict[str, torch.Tensor] = {}
    real_step = learner.optimizer.step

    def step() -> None:
        named = learner.policy.hf.named_parameters()
        gradients.update({name: whole_tensor(p.grad).clone() for name, p in named if p.grad is not None})
        real_step()

    learner.optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    share = groups[world.rank :: world.world_size]
    learner.update_grpo(share)
    [report] = learner.update_grpo(share)  # A has a gradient once B is not 0
    sums = RecordingEngine()
    WeightSync(learner.policy, sums).push()
    factors = {name: whole_tensor(factor).clone() for name, factor in adapter_factors(learner.policy.hf).items()}
    if world.is_main:
        torch.save({"gradients": gradients, "merged": sums.loaded, "factors": factors, "norm": report.grad_norm}, out)
    shutdown(world)
    exit_rank(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
