"""The copy of the weights that ranks of one machine have between them; one process's is in test_delivery.py."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.ranks import on_ranks
from tests.rollout.sglang.test_delivery import CPU, FLOAT, Worker, assert_holds
from tests.tiny_policy import TinyPolicy
from vcr1_fast.learner.sharding import World, gather_all, shard
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.sgl import messages
from vcr1_fast.rollout.sgl import workers as sglang_workers
from vcr1_fast.rollout.sgl.delivery import Broadcast, Delivery
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.weights import in_buckets
from vcr1_fast.rollout.sgl.workers import Workers
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import RunError

BUCKET_BYTES = 15_000  # of 160 KB


class Child(Worker):
    """Opens what it is fed as a process of its own would."""

    def __init__(self) -> None:
        super().__init__({})
        self.owners: set[int] = set()  # processes whose memory it was

    def _bytes(self, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        frames, _ = messages.encode("weights", {}, tensors, by_reference=True)
        self.owners.add(json.loads(bytes(frames[0]))["tensors"][0]["file"][0])
        return messages.decode(frames).tensors["bytes_B"]


class Rank:
    """A sharded policy, the same one whole, and an engine with one worker."""

    def __init__(self, world: World, way: str) -> None:
        self.world, self.worker = world, Child()
        self.policy, self.plain = TinyPolicy(), TinyPolicy()
        shard(self.policy, world, FLOAT)
        sglang_workers.make_workers = lambda *_: [self.worker]
        self.workers = Workers(SGLangConfig(backoff_s=0), {"device": "cpu"}, Path(tempfile.gettempdir()), FLOAT)
        self.copy = HostCopy()
        is_broadcast = way == "broadcast"
        parts = (BUCKET_BYTES, FLOAT, self.copy)
        self.workers._delivery = Broadcast(*parts, CPU, "127.0.0.1") if is_broadcast else Delivery(*parts)
        engine = cast(RolloutEngine, SimpleNamespace(load_weights=self.workers.load))
        self.sync = WeightSync(self.policy, engine, world=world, host_copy=self.workers.host_copy)

    def update(self) -> None:
        """All weights but the tower's, which later pushes leave out."""
        for policy in (self.policy, self.plain):
            policy.hf.model.visual.requires_grad_(False)
            with torch.no_grad():
                for weight in policy.parameters():
                    if weight.requires_grad:
                        weight.mul_(1.5)

    def assert_lost_worker_is_fed(self) -> None:
        """From both ranks' memory, on both at once."""
        self.worker.owners.clear()
        self.workers.revive(self.workers.seats[0], "was lost")
        assert_holds(self.worker, list(self.plain.hf.named_parameters()))
        self.workers.note_success()
        assert self.worker.owners == set(gather_all(os.getpid(), self.world))

    def num_kept_bytes(self) -> int:
        return sum(memory.bytes_B.numel() for _, memory in self.copy._buckets if memory)


def push_and_lose(world: World, way: str) -> None:
    """On each of two ranks: a copy between them feeds a lost worker of either."""
    messages.SHARED_FROM_BYTES = 1  # so small buckets, too, are opened where they lie
    rank = Rank(world, way)
    rank.sync.push()
    num_bytes = gather_all(rank.num_kept_bytes(), world)
    assert min(num_bytes) > 0 and sum(num_bytes) == 4 * sum(weight.numel() for weight in rank.plain.hf.parameters())
    rank.assert_lost_worker_is_fed()
    rank.update()
    if world.rank == 1:
        rank.worker._dies_at = rank.worker._num_messages + 3
    rank.sync.push()
    # the copy was still being written when it was lost
    assert (rank.worker.is_killed, rank.workers.num_restarts) == (world.rank == 1, 1)
    rank.assert_lost_worker_is_fed()
    assert gather_all(rank.num_kept_bytes(), world) == num_bytes

    if world.rank == 0:
        rank.worker._corrupts, rank.workers.seats[0].is_checked = "lm_head.weight", False
    with pytest.raises(OSError if world.rank else RunError, match="rank 0 failed" if world.rank else "lm_head"):
        rank.sync.push()
    with pytest.raises(RuntimeError, match="failed on another rank" if world.rank else "no whole set of weights"):
        rank.workers.revive(rank.workers.seats[0], "was lost, too")
    rank.worker._corrupts = ""
    rank.update()
    assert rank.sync.push().policy_version == 3
    rank.assert_lost_worker_is_fed()
    gather_all(None, world)  # the other one has read
    rank.workers.close()


@pytest.mark.parametrize("way", ["shared_memory", "broadcast"])
def test_two_ranks_keep_one_set_of_weights_and_feed_workers_of_either(way):
    on_ranks(push_and_lose, way)


def test_ranks_of_two_machines_keep_a_copy_each():
    copy = HostCopy()
    copy.begin([("another machine", {}), copy.told()], rank=1)
    assert not copy.awaits_others
    for bucket, _ in in_buckets([("a", torch.ones(3)), ("b", torch.ones(4))], 1, torch.float32):
        copy.keep(bucket)
    copy.end([("another machine", {"a": (0, 0, 0)}), copy.told()])
    assert [slot.name for bucket in copy.all() for slot in bucket.slots] == ["a", "b"]
    assert all(bool((slot.of(bucket.filled) == 1).all()) for bucket in copy.all() for slot in bucket.slots)


def test_a_part_that_is_gone_with_its_rank_ends_the_run_in_words():
    copy = HostCopy()
    machine, _ = copy.told()
    copy.begin([(machine, {}), copy.told()], rank=1)
    for bucket, _ in in_buckets([("a", torch.ones(3)), ("b", torch.ones(4))], 1, torch.float32):
        copy.keep(bucket)
    gone = subprocess.Popen(["true"])
    gone.wait()
    copy.end([(machine, {"a": (gone.pid, 3, 1)}), copy.told()])
    with pytest.raises(RunError, match=r"another rank of this machine kept .* resume the run"):
        copy.all()
