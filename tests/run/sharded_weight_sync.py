"""Run by test_weight_sync on each rank: push a sharded policy, compare with the same policy unsharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.recording_engine import RecordingEngine
from tests.tiny_policy import TinyPolicy, tokens
from vcr1_fast.learner.sharding import World, exit_rank, init_distributed, shard, shutdown
from vcr1_fast.run.weight_sync import WeightSync

SMALL_BYTES = 15_000  # of 200 KB: a push takes 12 buckets


class Dies(RecordingEngine):
    """After so many weights of its first push."""

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.num_weights: int | None = num_weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        if self.num_weights is None:
            return super().load_weights(weights, policy_version)
        remaining = iter(weights)
        for _ in range(self.num_weights):
            next(remaining)
        self.num_weights = None
        raise RuntimeError("engine died")


def check_a_dying_engine(policy: TinyPolicy, wanted: dict[str, nn.Parameter], world: World) -> None:
    """Whenever it dies, on whatever rank, each rank makes every gather and hears of it; the next push reaches both."""
    for num_weights, dying in ((0, 1), (1, 0), (20, 1)):
        engine = Dies(num_weights) if world.rank == dying else RecordingEngine()
        sync = WeightSync(policy, engine, bucket_bytes=SMALL_BYTES, world=world)
        with CommDebugMode() as first:
            try:
                sync.push()
            except RuntimeError:
                assert world.rank == dying
            except OSError as error:
                assert world.rank != dying and f"rank {dying} failed" in str(error)
        assert sync.policy_version == 0
        with CommDebugMode() as second:
            assert sync.push().policy_version == 1
        assert first.get_total_counts() == second.get_total_counts() == 13  # the last one tells how it went
        assert engine.loaded.keys() == wanted.keys()
        assert all(torch.equal(engine.loaded[name], weight) for name, weight in wanted.items())


def main() -> None:
    world = init_distributed("cpu")
    policy, plain = TinyPolicy(), TinyPolicy()
    shard(policy, world, torch.bfloat16)
    wanted = dict(plain.hf.named_parameters())
    check_a_dying_engine(policy, wanted, world)
    engine = RecordingEngine()
    sync = WeightSync(policy, engine)
    with torch.no_grad():
        policy(tokens(0))  # leaves FSDP's root gathered in bfloat16; the masters must be pushed
    report = sync.push()
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
