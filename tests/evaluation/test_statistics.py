"""Intervals and p-values against what can be worked out by hand."""

import time

import numpy as np
import pytest

from vcr1_fast.evaluation.statistics import cluster_sums, mean_intervals, sign_flip_p_values


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_interval_of_two_examples_is_all_there_is():
    """0 and 1: a resample's mean is 0, 0.5, 1 with chances 1/4, 1/2, 1/4, so 2.5 % and 97.5 % are 0 and 1."""
    interval = mean_intervals(column(0.0, 1.0), ["a", "b"])
    assert interval is not None and interval.tolist() == [[0.0], [1.0]]
    narrow = mean_intervals(column(0.0, 1.0), ["a", "b"], confidence=0.4)  # 30 % and 70 % lie in the middle half
    assert narrow is not None and narrow.tolist() == [[0.5], [0.5]]


def test_interval_width_is_that_of_the_normal_law():
    """400 coin flips, half heads: standard error 0.5 / 20 = 0.025, so 95 % is 0.5 +- 1.96 * 0.025 = 0.049."""
    values = np.tile([0.0, 1.0], 200)[:, None]
    interval = mean_intervals(values, list(range(400)))
    assert interval is not None
    low, high = interval[:, 0]
    assert low == pytest.approx(0.5 - 0.049, abs=0.005) and high == pytest.approx(0.5 + 0.049, abs=0.005)


def test_questions_about_one_video_are_drawn_together():
    """4 questions on each of 100 videos, all alike within a video: the width is that of 100 examples, not of 400."""
    per_video = np.tile([0.0, 1.0], 50)
    values = np.repeat(per_video, 4)[:, None]
    by_video = mean_intervals(values, np.repeat(np.arange(100), 4).tolist())
    alone = mean_intervals(values, list(range(400)))
    assert by_video is not None and alone is not None
    width = (by_video[1] - by_video[0])[0]
    assert width == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    assert width == pytest.approx(2 * (alone[1] - alone[0])[0], rel=0.1)  # sqrt(4) times as wide


def test_a_mean_over_unequal_videos_weighs_examples_not_videos():
    sums, sizes = cluster_sums(column(1.0, 1.0, 1.0, 0.0), ["a", "a", "a", "b"])
    assert sums.tolist() == [[3.0], [0.0]] and sizes.tolist() == [3.0, 1.0]
    interval = mean_intervals(column(1.0, 1.0, 1.0, 0.0), ["a", "a", "a", "b"], confidence=0.4)
    assert interval is not None and interval.tolist() == [[0.75], [0.75]]  # both videos once: 3 of 4 examples


def test_one_video_says_nothing_about_others():
    assert mean_intervals(column(0.0, 1.0), ["a", "a"]) is None


def test_the_same_seed_gives_the_same_interval():
    values = np.linspace(0, 1, 30)[:, None] ** 2
    first, again, other = (mean_intervals(values, list(range(30)), seed=seed) for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert first.tolist() == again.tolist() != other.tolist()


def test_sign_flips_are_enumerated_for_few_videos():
    """Differences 1, 1, 1: of the 8 sign choices two reach |sum| 3. Differences 3, 1: all four reach |sum| >= 2 ...
    and |sum| 4 only two."""
    assert sign_flip_p_values(column(1.0, 1.0, 1.0), [1, 2, 3]).tolist() == [0.25]
    assert sign_flip_p_values(column(3.0, 1.0), [1, 2]).tolist() == [0.5]
    assert sign_flip_p_values(column(3.0, -1.0), [1, 2]).tolist() == [1.0]
    assert sign_flip_p_values(column(0.0, 0.0), [1, 2]).tolist() == [1.0]
    # two questions about one video flip together: one cluster, two choices, both reach |sum| 2
    assert sign_flip_p_values(column(1.0, 1.0), ["v", "v"]).tolist() == [1.0]
    # 0.1 + 0.2 - 0.3 is 5e-17, not 0: a tie all the same
    assert sign_flip_p_values(column(0.1, 0.2, -0.3), [1, 2, 3]).tolist() == [1.0]


def test_sign_flips_are_sampled_for_many_videos():
    """20 equal differences reach their sum in 2 of 2^20 choices: none of 10,000 draws, so p is 1 / 10,001."""
    values = np.column_stack([np.ones(20), np.tile([1.0, -1.0], 10)])
    p_values = sign_flip_p_values(values, list(range(20)))
    assert p_values.tolist() == [1 / 10_001, 1.0]
    # 15 of 20 for one side: the binomial tail P(|X - 10| >= 5) with p 1/2 is 0.0414
    signs = np.where(np.arange(20) < 15, 1.0, -1.0)[:, None]
    assert sign_flip_p_values(signs, list(range(20)))[0] == pytest.approx(0.0414, abs=0.008)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for 3 clusters"):
        mean_intervals(column(0.0, 1.0), ["a", "b", "c"])
    with pytest.raises(ValueError, match="E >= 1"):
        sign_flip_p_values(np.zeros((0, 1)), [])


def test_10000_resamples_of_5000_examples_take_seconds():
    values = np.random.default_rng(0).random((5000, 4))
    began = time.process_time()
    assert mean_intervals(values, list(range(5000))) is not None
    assert time.process_time() - began < 5.0
