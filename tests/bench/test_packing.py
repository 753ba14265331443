"""The benchmark compares equal work: both ways give the same loss, and the token ratio is what the sizes say."""

import pytest

from bench.packing import NUM_TEXT_TOKENS, measure


def test_both_ways_give_the_same_loss():
    row = measure((2, 8, 12, 3), repeats=1)
    prompt = NUM_TEXT_TOKENS + 2 * 16
    assert row["prompt_tokens"] == prompt
    assert row["token_ratio"] == pytest.approx(3 * (prompt + 11) / (prompt + 3 * 11))
    assert row["loss_difference"] < 1e-5
    assert row["time_ratio"] > 0
