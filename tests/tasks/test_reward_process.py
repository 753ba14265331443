"""Rewards that hang, leave, crash or lie, in a process that can be ended, and the next call after each of them."""

import dataclasses
import math
import os
import signal
import time
from pathlib import Path

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.reward_process import RewardError, RewardTimeoutError
from vcr1_fast.types import Example, IntervalTruth

CODE = """\
import os, random, re, sys, time
import numpy
state = []
def reward(examples, answers):
    said = answers[0]
    if said == "regex": re.match(r"(a+)+$", "a" * 40 + "b")  # holds the GIL for hours
    if said == "sleep": time.sleep(1e6)
    if said == "leave": sys.exit(0)
    if said == "end": os._exit(7)
    if said == "kill": os.kill(os.getpid(), 11)
    if said == "raise": raise KeyError("x")
    if said == "nan": return [float("nan")] * len(answers)
    if said == "draw": return [random.random()]
    if said == "draw in numpy": return [numpy.random.rand()]
    if said == "pid": return [1 / os.getpid()]
    state.append(said)
    return [1 / len(state)] * len(answers)
"""
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory):
    """score(answer): the part "reward" of one answer."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "my_process_rewards.py").write_text(CODE)
    example = Example("a", "temporal_grounding", "a.mp4", "a dog", 8.0, IntervalTruth(((2.0, 4.0),)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        rewards = {"temporal_grounding": ("my_process_rewards:reward",)}
        task = make_tasks(TaskConfig(rewards=rewards, reward_timeout_s=TIMEOUT_S))["temporal_grounding"]
        yield lambda answer: task.score([example], [answer])["reward"][0]


WHAT = "reward reward of task temporal_grounding"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("regex", RewardTimeoutError, r"did not finish within 1 s \(task\.reward_timeout_s\); its process was ended"),
        ("sleep", RewardTimeoutError, r"did not finish within 1 s"),
        ("leave", RewardError, r"raised SystemExit: 0 \(my_process_rewards\.py, line 8\)"),
        ("end", RewardError, "ended its process: exit status 7"),
        ("kill", RewardError, f"ended its process: signal {signal.SIGSEGV.value}"),
        ("raise", RewardError, r"raised KeyError: 'x' \(my_process_rewards\.py, line 11\)"),
        ("nan", RewardError, r"gave nan for answer 0 \(example a\), wanted a number in \[0, 1\]"),
    ],
)
def test_what_a_reward_does_is_named_and_the_next_one_is_scored(score, answer: str, error, message: str):
    with pytest.raises(error, match=f"{WHAT} {message}") as caught:
        score(answer)
    assert type(caught.value) is error
    assert 0 < score("fine") <= 1


def test_its_process_keeps_its_state_and_is_not_the_trainers(score):
    pid = round(1 / score("pid"))
    assert pid != os.getpid()
    first = 1 / score("fine")
    assert 1 / score("fine") == pytest.approx(first + 1)
    with pytest.raises(RewardTimeoutError):
        score("regex")
    while Path(f"/proc/{pid}").exists():  # ended, not left to itself
        time.sleep(0.01)
    assert score("fine") == 1.0  # anew


def test_without_a_limit_it_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_near_rewards.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = {"temporal_grounding": ("my_near_rewards:reward",)}
    task = make_tasks(TaskConfig(rewards=rewards, reward_timeout_s=0.0))["temporal_grounding"]
    example = Example("a", "temporal_grounding", "a.mp4", "a dog", 8.0, IntervalTruth(((2.0, 4.0),)))
    assert task.score([example], ["pid"])["reward"] == [1 / os.getpid()]
    with pytest.raises(RewardError, match="raised SystemExit: 0"):
        task.score([example], ["leave"])


def test_what_cannot_travel_is_named(score, monkeypatch: pytest.MonkeyPatch):
    task = make_tasks(TaskConfig(rewards={"temporal_grounding": ("my_process_rewards:reward",)}))["temporal_grounding"]
    example = Example("a", "temporal_grounding", "a.mp4", "a dog", 8.0, IntervalTruth(((2.0, 4.0),)))
    example = dataclasses.replace(example, categories=lambda: math.pi)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"cannot be asked in its process .*set task\.reward_timeout_s=0"):
        task.score([example], ["fine"])


@pytest.mark.parametrize("answer", ["draw", "draw in numpy"])
def test_what_a_reward_draws_follows_from_what_it_is_asked(score, answer: str):
    """So a killed run that asks again in another process gets the same; other answers get other numbers."""
    first = score(answer)
    with pytest.raises(RewardError):
        score("end")  # the next question starts a process anew
    assert score(answer) == first != score("draw" if answer != "draw" else "draw in numpy")
