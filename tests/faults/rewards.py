"""Reward functions of the runs: one that every step learns from, and those that fail. Read by `task.rewards`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.types import Example


def letters(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """Which letters an answer has: its answers rarely have two equal ones, so no gradient is zero."""
    return [sum(map(ord, answer)) % 97 / 97 for answer in answers]


def failing(examples: Sequence[Example], answers: Sequence[str]) -> object:
    """`letters`, unless FAULTS_REWARD names a failure and the file FAULTS_REWARD_WELL is not there."""
    how = os.environ["FAULTS_REWARD"]
    count = Path(os.environ["FAULTS_REWARD_WELL"])
    if count.exists():
        return letters(examples, answers)
    return FAILURES[how](examples, answers)


def _raises(examples: Sequence[Example], answers: Sequence[str]) -> object:
    raise RuntimeError("the reward's server is away\nand this is its second line \x1b[31m")


def _exits(examples: Sequence[Example], answers: Sequence[str]) -> object:
    sys.exit("the reward has had enough")


def _hangs(examples: Sequence[Example], answers: Sequence[str]) -> object:
    time.sleep(3600)
    return []


FAILURES = {
    "raises": _raises,
    "exits": _exits,
    "hangs": _hangs,
    "nan": lambda examples, answers: [float("nan")] * len(answers),
    "infinite": lambda examples, answers: [float("inf")] * len(answers),
    "huge": lambda examples, answers: [1e30] * len(answers),
    "short": lambda examples, answers: [0.5] * (len(answers) - 1),
    "none": lambda examples, answers: None,
    "texts": lambda examples, answers: ["1.0"] * len(answers),
}
