"""Run by test_weight_sync on each rank: push a sharded policy, compare with the same policy unsharded."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.recording_engine import RecordingEngine
from tests.tiny_policy import TinyPolicy, tokens
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shard, shutdown
from vcr1_fast.run.weight_sync import WeightSync


class StopsEarly(RecordingEngine):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        next(iter(weights))
        raise RuntimeError("engine died")


def main() -> None:
    world = init_distributed("cpu")
    policy, plain = TinyPolicy(), TinyPolicy()
    shard(policy, world, torch.bfloat16)
    # An engine that dies on one rank must not leave the other one waiting.
    sync = WeightSync(policy, StopsEarly() if world.rank else RecordingEngine())
    try:
        sync.push()
    except RuntimeError:
        assert world.rank == 1
    engine = RecordingEngine()
    sync = WeightSync(policy, engine)
    with torch.no_grad():
        policy(tokens(0))  # leaves FSDP's root gathered in bfloat16; the masters must be pushed
    report = sync.push()
    wanted = dict(plain.hf.named_parameters())
    assert list(engine.loaded) == list(wanted)
    for name, weight in wanted.items():
        assert not isinstance(engine.loaded[name], DTensor)
        assert torch.equal(engine.loaded[name], weight), name
    assert report.num_bytes == 4 * sum(weight.numel() for weight in wanted.values())
    half = RecordingEngine()
    WeightSync(policy, half, dtype=torch.bfloat16).push()
    assert all(torch.equal(half.loaded[name], weight.bfloat16()) for name, weight in wanted.items())
    shutdown(world)
    exit_rank(0)


main()
