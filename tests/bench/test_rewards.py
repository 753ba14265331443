"""The benchmark of rewards: the original's way by hand, agreement of all ways, and what a run gives."""

import argparse

import numpy as np
import pytest

from bench import rewards
from vcr1_fast import native


def test_the_originals_way_by_hand():
    texts = [
        "<think>a</think><answer>2 to 6</answer>",
        "<answer>6 to 2</answer>",
        "<think>a</think> <answer>4 to 10</answer>",
        "no",
    ] * 2
    formats, ious, advantages = rewards.original_grounding(texts, [[(4.0, 10.0)]] * 8)
    assert formats == [1.0, 0.0, 1.0, 0.0] * 2
    assert ious == [2 / 8, 0.0, 1.0, 0.0] * 2
    # rewards 1.25, 0, 2, 0, twice: mean 0.8125, squared distances 2 * (0.1914... + 2 * 0.6601... + 1.4101...) = 5.84375
    assert advantages[0] == pytest.approx(0.4375 / ((5.84375 / 7) ** 0.5 + 1e-4), rel=1e-12)

    box = [0.0, 0.0, 1.0, 1.0]
    half = [0.0, 0.0, 0.5, 1.0]
    lists = [[box] * 8, [half] * 8, [box] * 7, [box] * 4 + [half] * 4]
    answers = [f"<think>a</think>\n<answer>{rows}</answer>" for rows in lists] * 2
    formats, ious, _ = rewards.original_tracking(answers, [[tuple(box)] * 8] * 8)
    assert formats == [1.0, 1.0, 0.0, 1.0] * 2
    assert ious == [1.0, 0.5, 0.0, 0.75] * 2


@pytest.mark.parametrize("task", ["grounding", "tracking"])
def test_all_ways_agree_on_answers_of_every_kind(task):
    ways, num_chars = rewards.ways_of(task, 256)
    rewards.check_agreement(ways)
    formats, ious, _ = ways["plain"]()
    assert 0.6 < np.mean(formats) < 0.98  # some are cut off
    assert 0.2 < np.mean(np.array(ious) > 0.0) < 0.98
    assert 300 < num_chars / 256 < 1500
    assert ("tasks" in ways) == native.is_available()
    ways["broken"] = lambda: (formats, [iou + 1e-9 for iou in ious], formats)
    with pytest.raises(AssertionError, match="broken: iou"):
        rewards.check_agreement(ways)


def test_a_run_gives_one_row_per_task_count_and_way(monkeypatch, capsys):
    monkeypatch.setattr(rewards, "COUNTS", (16,))
    monkeypatch.setattr(rewards, "MIN_SAMPLE_S", 0.0)
    rows = rewards.run(argparse.Namespace(repeats=2))["rows"]
    assert {row["task"] for row in rows} == {"grounding", "tracking"}
    assert len(rows) >= 4
    for row in rows:
        assert row["completions"] == 16
        assert row["completions_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
        assert row["speedup"] == 1.0 or row["way"] != "original"
    assert "rewards of N completions" in capsys.readouterr().out
