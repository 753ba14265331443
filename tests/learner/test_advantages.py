"""Advantages against numbers worked out by hand."""

import math

import pytest

from vcr1_fast.learner.advantages import group_advantages, with_advantages


def test_group_scale_by_hand():
    # mean 1, unbiased std sqrt((1 + 0 + 1) / 2) = 1
    [advantages] = group_advantages([[0.0, 1.0, 2.0]], "group")
    assert advantages == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001])


def test_batch_scale_uses_the_spread_of_all_rewards():
    rewards = [[0.0, 2.0], [4.0, 4.0]]
    # mean 2.5, unbiased variance (6.25 + 0.25 + 2.25 + 2.25) / 3 = 11 / 3
    std = math.sqrt(11 / 3) + 1e-4
    assert group_advantages(rewards, "batch") == [pytest.approx([-1 / std, 1 / std]), [0.0, 0.0]]


def test_no_scale_is_the_distance_from_the_group_mean():
    assert group_advantages([[0.0, 3.0]], "none") == [[-1.5, 1.5]]


def test_equal_rewards_and_single_completions_have_exactly_zero_advantage():
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary: the mean must not leave a residue
    assert group_advantages([[0.1] * 3, [0.7], []]) == [[0.0] * 3, [0.0], []]


def test_groups_carry_their_advantages(make_group):
    import dataclasses

    group = dataclasses.replace(make_group(0, (3, 4)), rewards=(0.0, 1.0), advantages=())
    [scored] = with_advantages([group], "none")
    assert scored.advantages == (-0.5, 0.5)
    assert scored.is_trainable
    assert not dataclasses.replace(scored, advantages=(0.0, 0.0)).is_trainable
