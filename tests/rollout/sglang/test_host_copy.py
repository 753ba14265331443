"""The copy of the weights that ranks of one machine have between them; one process's is in test_delivery.py."""

import subprocess
import sys

import pytest
import torch

from tests.tiny_policy import REPOSITORY
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.weights import in_buckets
from vcr1_fast.types import RunError


def test_two_ranks_keep_one_set_of_weights_and_feed_workers_of_either():
    command = [sys.executable, "-m", "tests.rollout.sglang.host_copy_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]


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
