"""The best constant interval against the same search through the score itself."""

import time

import numpy as np
import pytest

from vcr1_fast.tasks.constant_interval import GRID_STEPS, best_constant_interval
from vcr1_fast.tasks.overlap import interval_iou_batch_plain


def test_by_hand():
    assert best_constant_interval([[(0.0, 5.0)], [(0.0, 10.0)]], [10.0, 20.0]) == (0.0, 0.5)
    # the middle is missing: 0.2 to 0.4 has 2 of 4 s, all from 0.2 to 1 has 4 of 8; the first is kept
    assert best_constant_interval([[(2.0, 4.0), (8.0, 10.0)]], [10.0]) == (0.2, 0.4)
    assert best_constant_interval([], []) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 1 truths and 2 durations"):
        best_constant_interval([[(0.0, 1.0)]], [1.0, 2.0])


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_search_through_the_score(seed):
    generator = np.random.default_rng(seed)
    durations_s = generator.uniform(5, 100, 40).tolist()
    truths = []
    for duration_s in durations_s:
        ends = np.sort(generator.beta(2, 3, (generator.integers(1, 4), 2)) * duration_s * 1.1, axis=1)
        truths.append([(float(start), float(end)) for start, end in ends])
    truths[0] = [(20.9, 12.0)]  # reversed, as four rows of Charades-STA
    means = {}
    for first in range(GRID_STEPS):
        for last in range(first + 1, GRID_STEPS + 1):
            fracs = (first / GRID_STEPS, last / GRID_STEPS)
            predicted = [[(fracs[0] * duration_s, fracs[1] * duration_s)] for duration_s in durations_s]
            means[fracs] = np.mean(interval_iou_batch_plain(predicted, truths, "set"))
    best = best_constant_interval(truths, durations_s)
    assert means[best] == pytest.approx(max(means.values()), abs=1e-12)


def test_time_of_the_largest_benchmark():
    generator = np.random.default_rng(0)
    starts = generator.uniform(0, 50, 17_031)  # ActivityNet's test split
    start = time.process_time()
    best_constant_interval([[(s, s + 10.0)] for s in starts.tolist()], [60.0] * len(starts))
    assert time.process_time() - start < 2.0
