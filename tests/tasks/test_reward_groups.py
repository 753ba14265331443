"""Advantages against numbers computed by hand, and against torch."""

import math

import pytest
import torch

from vcr1_fast.learner import advantages
from vcr1_fast.tasks.reward_groups import group_advantages, group_advantages_plain

REWARDS = [0.0, 1.0, 2.0, 1.0, 1.0, 3.0]
OFFSETS = [0, 3, 5, 5, 6]  # groups of 3, 2, 0 and 1


@pytest.mark.parametrize("function", [group_advantages, group_advantages_plain])
def test_advantages_by_hand(function):
    # group 0: mean 1, unbiased std 1; group 1: all equal; group 3: one answer
    group = 1.0 / (1.0 + 1e-4)
    assert function(REWARDS, OFFSETS, "group") == [-group, 0.0, group, 0.0, 0.0, 0.0]
    assert function(REWARDS, OFFSETS, "none") == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    # all six: mean 4/3, sum of squares 16/9 + 3 * 1/9 + 4/9 + 25/9 = 48/9, unbiased variance 16/15
    batch = 1.0 / (math.sqrt(16 / 15) + 1e-4)
    assert function(REWARDS, OFFSETS, "batch") == pytest.approx([-batch, 0.0, batch, 0.0, 0.0, 0.0], rel=1e-15)
    assert function([], [0], "group") == []


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_torch_and_is_what_the_learner_gets(scale):
    """Against torch's own mean and std, within a few roundings of float64."""
    groups = [[0.3, 0.7, 1.9, 0.7], [1.0, 1.0], [], [0.1, 1.7, 0.2]]
    flat = [reward for group in groups for reward in group]
    got = advantages.group_advantages(groups, scale)
    assert [value for group in got for value in group] == group_advantages(flat, [0, 4, 6, 6, 9], scale)
    everything = torch.tensor(flat, dtype=torch.float64)
    for group, values in zip(groups, got, strict=True):
        reward_G = torch.tensor(group, dtype=torch.float64)
        if len(set(group)) < 2:
            assert values == [0.0] * len(group)
            continue
        divisor = {"group": reward_G.std() + 1e-4, "batch": everything.std() + 1e-4, "none": 1.0}[scale]
        assert values == pytest.approx(((reward_G - reward_G.mean()) / divisor).tolist(), rel=1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="scale is 'std', wanted 'group', 'batch' or 'none'"):
        group_advantages([1.0], [0, 1], "std")
    for offsets in ([], [1], [0], [0, 2, 1], [0, 3]):
        with pytest.raises(ValueError, match="wanted to rise from 0 to 1"):
            group_advantages([1.0], offsets, "group")
