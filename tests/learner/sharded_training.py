"""Run by test_sharding on each rank: one update of the sharded policy, weights and norm written by rank 0.

Arguments: output file, `tied` or `untied`, compute dtype.
"""

import sys

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.tiny_policy import TinyPolicy, patches, tokens
from vcr1_fast.learner.optimizer import build_optimizer, clip_grad_norm
from vcr1_fast.learner.sharding import (
    all_max_int,
    all_reduce_sum,
    barrier,
    exit_rank,
    init_distributed,
    named_weights,
    on_main_rank,
    shard,
    shutdown,
    whole_tensor,
)
from vcr1_fast.settings.config import OptimizerConfig


def check_collectives(world) -> None:
    rank = world.rank
    assert all_max_int(10 * rank - 5, world) == 5
    values = torch.tensor([1.0, rank])
    assert all_reduce_sum(values, world).tolist() == [2.0, 1.0]
    assert values.tolist() == [1.0, rank]
    names = {"b": 1.0, "a": 2.0} if rank else {"a": 10.0, "b": 0.5}  # order does not matter
    assert all_reduce_sum(names, world) == {"a": 12.0, "b": 1.5}
    try:
        all_reduce_sum({f"only_{rank}": 1.0}, world)
    except ValueError as error:
        assert f"rank {rank} has ['only_{rank}']" in str(error)
    else:
        raise AssertionError("different names were added up")

    def fail() -> None:
        raise PermissionError("no")

    wanted = PermissionError if rank == 0 else OSError
    try:
        on_main_rank("trying", fail, world)
    except OSError as error:
        assert type(error) is wanted, error
        assert rank == 0 or str(error) == "rank 0 failed while trying; its own message says why"
    else:
        raise AssertionError("the failure of rank 0 was not seen")
    barrier(world)


def main() -> None:
    output, tied, dtype_name = sys.argv[1:]
    world = init_distributed("cpu")
    assert (world.world_size, world.device.type) == (2, "cpu")
    check_collectives(world)
    policy = TinyPolicy(tied=tied == "tied")
    shard(policy, world, getattr(torch, dtype_name))
    parameters = list(policy.parameters())
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
    assert policy.hf.lm_head.weight.to_local().shape == ((34, 33)[world.rank], 32)  # 67 rows
    assert (policy.hf.lm_head.weight is policy.hf.model.language_model.embed_tokens.weight) == (tied == "tied")
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1.0, eps=1.0))
    for index in range(2):  # gradients add up over micro-batches, then over ranks
        (policy(tokens(2 * world.rank + index), patches(2 * world.rank + index)) / 4).backward()
    gradients = {n: whole_tensor(w.grad) for n, w in named_weights(policy).items() if w.grad is not None}
    norm = clip_grad_norm(policy, 0.05)
    optimizer.step()
    with torch.no_grad():
        policy(tokens(0))  # leaves the root gathered; named_weights must still see the masters
    weights = {n: whole_tensor(w) for n, w in named_weights(policy).items()}
    if world.is_main:
        tensors = {f"grad.{n}": g for n, g in gradients.items()} | {f"weight.{n}": w for n, w in weights.items()}
        save_file({**tensors, "norm": torch.tensor([norm], dtype=torch.float64)}, output)
    shutdown(world)
    exit_rank(0)


main()
