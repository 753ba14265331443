"""Groups that change ranks are the same bit for bit, and training on them elsewhere gives the same updates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.learner.exchanged_groups import assert_same, example_groups
from vcr1_fast.learner.exchange import exchange, from_bytes, gather_sizes, to_bytes
from vcr1_fast.learner.row_cost import group_size
from vcr1_fast.learner.sharding import World
from vcr1_fast.learner.step import Learner

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("index", range(6))
def test_a_group_comes_back_from_bytes_bit_for_bit(index):
    group = example_groups()[index]
    assert_same(from_bytes(to_bytes(group), torch.device("cpu")), group)


def test_pixels_of_frames_are_one_byte_each():
    num_values = 96 * 1176
    sizes = [to_bytes(group).numel() for group in example_groups()[:3]]
    assert sizes[0] > 4 * num_values  # random numbers are sent as float32
    rest = 3 * 256 * 4 + 3000  # the values of the bytes; ids, positions, log-probs and the pickle
    assert num_values < sizes[1] < num_values + rest and num_values < sizes[2] < num_values + rest


def test_views_of_larger_tensors_send_only_what_they_show():
    group = example_groups()[0]
    ids_R = torch.arange(1_000_000)[5:8]
    object.__setattr__(group.completions[0], "token_ids_R", ids_R)
    sent = to_bytes(group)
    assert sent.numel() < 500_000
    assert from_bytes(sent, torch.device("cpu")).completions[0].token_ids_R.tolist() == [5, 6, 7]


def test_one_process_keeps_its_groups():
    groups = dict(enumerate(example_groups()))
    assert exchange(groups, [0] * 6, {0: 0, 3: 0}, World()) == groups
    sizes = [group_size(group, mask_truncated=False, is_run=True) for group in groups.values()]
    assert gather_sizes(sizes, World()) == [sizes]


def test_two_ranks_exchange_and_train_as_one_process_does(make_model, make_group, tmp_path):
    from tests.learner.test_step import make_config

    make_model().save_pretrained(tmp_path / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command = [*launch, "tests.learner.exchange_ranks", str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in (0, 1)]

    assert ranks[0]["rows"] == ranks[1]["rows"] and ranks[0]["reports"] == ranks[1]["reports"]
    members = [[0, 1, 4], [2, 3, 5]]  # half of what each rank drew, and of each update rank 0 would have run 2 of 3
    for update, rows in zip(members, ranks[0]["rows"], strict=True):
        assert sorted(i for mine in rows for row in mine for i in row) == update
        assert sorted(len(mine) for mine in rows) == [1, 2]
    for rank, seen in enumerate(ranks):
        assert seen["num_rows"] == [len(rows[rank]) for rows in seen["rows"]]

    learner = Learner(make_config(tmp_path / "model", 1, minibatches_per_rollout=2), World(), 10)
    alone = learner.update_grpo([make_group(seed, (5, 3, 8 + seed)) for update in members for seed in update])
    for report, (sums, grad_norm) in zip(alone, ranks[0]["reports"], strict=True):
        assert grad_norm == pytest.approx(report.grad_norm, rel=1e-5)
        for name in ("loss", "tokens", "tokens_executed", "tokens_unshared", "entropy"):
            assert sums[name] == pytest.approx(report.sums[name], rel=1e-5, abs=1e-7), name
