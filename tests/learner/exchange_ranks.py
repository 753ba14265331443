"""One of two ranks of test_exchange.py: groups change ranks, and a rollout that one rank drew is trained on by both.

Arguments: the model's folder, and where each rank writes what it saw.
"""

import sys
from pathlib import Path

import torch

from tests.learner.conftest import random_group
from tests.learner.exchanged_groups import HOMES, RANK_OF, SHARES, assert_same, example_groups
from tests.learner.test_step import make_config
from vcr1_fast.learner import step
from vcr1_fast.learner.exchange import exchange
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown
from vcr1_fast.learner.step import Learner


def check_exchange(world) -> None:
    groups = example_groups()
    mine = {i: groups[i] for i, home in enumerate(HOMES) if home == world.rank}
    held = exchange(mine, HOMES, RANK_OF, world)
    for i, rank in RANK_OF.items():
        if rank == world.rank:
            assert_same(held[i], groups[i])
    kept = exchange(mine, HOMES, {i: HOMES[i] for i in RANK_OF}, world)
    assert kept == mine and all(kept[i] is mine[i] for i in mine)


def train(world, model: str) -> dict[str, object]:
    """Two updates of six groups, of which rank 0 has four, in rows of one group."""
    learner = Learner(make_config(Path(model), 1, minibatches_per_rollout=2), world, 10)
    plans = []
    plan_and_pack = step.plan_and_pack
    step.plan_and_pack = lambda *args: plans.extend(plan_and_pack(*args)) or plans
    reports = learner.update_grpo([random_group(seed, (5, 3, 8 + seed)) for seed in SHARES[world.rank]])
    return {
        "reports": [(report.sums, report.grad_norm) for report in reports],
        "rows": [update.plan.rows for update in plans],
        "num_rows": [len(update.rows) for update in plans],
    }


def main(model: str, out: str) -> None:
    world = init_distributed("cpu")
    check_exchange(world)
    torch.save(train(world, model), f"{out}.{world.rank}")
    shutdown(world)
    exit_rank(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
