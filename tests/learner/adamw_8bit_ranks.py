"""The two ranks of test_adamw_8bit.py, forked from one process: rows of unequal number, some of them in blocks of 256.

Argument: the run's folder.
"""

from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.learner.test_adamw_8bit import EIGHT, SHAPES_OF_RANKS, Policy, update
from tests.tiny_policy import fork_ranks
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule
from vcr1_fast.learner.sharding import device_mesh, exit_rank, init_distributed, shutdown
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint


def main(run: str) -> None:
    world = init_distributed("cpu")

    def parts():
        policy = Policy(SHAPES_OF_RANKS)
        fully_shard(policy, mesh=device_mesh(world))
        optimizer = build_optimizer(policy, EIGHT)
        return policy, optimizer, build_schedule(optimizer, EIGHT, 10)

    with torch.compiler.set_stance("force_eager"):
        saved = parts()
        update(saved, 2)
        assert hasattr(saved[1].state[saved[0].coded]["exp_avg"], "codes")  # 34 or 33 rows of 256
        assert hasattr(saved[1].state[saved[0].odd]["exp_avg"], "codes") == (world.rank == 1)  # 33 or 32 rows of 128
        folder = save_checkpoint(run, *saved, RunState(2, 0, 0, 0, "", ""), world, keep=1)
        loaded = parts()
        load_checkpoint(folder, *loaded, world)
        for weight, other in zip(saved[0].parameters(), loaded[0].parameters(), strict=True):
            was, now = (moments[w]["exp_avg"] for moments, w in ((saved[1].state, weight), (loaded[1].state, other)))
            assert torch.equal(getattr(was, "codes", was), getattr(now, "codes", now))
        update(saved, 1, first=2)
        whole = [weight.full_tensor() for weight in saved[0].parameters() if isinstance(weight, DTensor)]
    if world.is_main:
        torch.save(whole, Path(run) / "weights.pt")
    shutdown(world)
    exit_rank(0)


if __name__ == "__main__":
    fork_ranks(2, main)
