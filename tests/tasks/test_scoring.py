"""Scoring of a step's answers, and what happens when a reward breaks."""

import dataclasses
import math

import pytest
import torch

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.reward_process import RewardError, RewardTimeoutError
from vcr1_fast.tasks.scoring import RewardFailure, score_groups
from vcr1_fast.types import Completion, Example, IntervalTruth, RolloutGroup

GOOD, HALF, BAD = (f"<think>x</think><answer>{answer}</answer>" for answer in ("2.00 to 4.00", "2.00 to 3.00", "none"))


@pytest.fixture
def make_group(make_prompt):
    def make(name: str, *answers: str) -> RolloutGroup:
        truth = IntervalTruth(((2.0, 4.0),))
        example = Example(name, "temporal_grounding", f"{name}.mp4", "a red circle appears", 8.0, truth)
        prompt = dataclasses.replace(make_prompt((1, 4, 4), "text"), example=example)
        completions = [Completion(torch.arange(9 * (i + 1)), torch.zeros(1), "stop", a) for i, a in enumerate(answers)]
        return RolloutGroup(prompt, tuple(completions), 1)

    return make


def test_each_group_gets_the_scores_of_its_own_answers(make_group):
    tasks, config = make_tasks(TaskConfig()), TaskConfig(reward_weights={"iou": 2.0})
    groups = score_groups([make_group("a", GOOD, BAD), make_group("b", HALF, GOOD, BAD)], tasks, config).groups
    assert [g.prompt.example.id for g in groups] == ["a", "b"]
    assert [g.reward_parts["iou"] for g in groups] == [(1.0, 0.0), (0.5, 1.0, 0.0)]
    assert [g.reward_parts["format"] for g in groups] == [(1.0, 0.0), (1.0, 1.0, 0.0)]
    assert [g.rewards for g in groups] == [(3.0, 0.0), (2.0, 3.0, 0.0)]


def test_shaping_changes_the_reward_and_not_the_logged_parts(make_group):
    config = TaskConfig(shaping={"iou": "tempsamp_r1"}, length_reward="overlong", length_tokens=(0, 1000))
    [group] = score_groups([make_group("a", GOOD, HALF)], make_tasks(config), config).groups
    assert group.reward_parts["iou"] == (1.0, 0.5)
    assert group.reward_parts["length"] == (0.991, 0.982)  # 9 and 18 tokens
    # format 1, then f(1) = 0.8 + 0.01 ln 1.2 and f(0.5) = 0.8 - (e^0.3 - 1) / (e - 1), then the length
    want = (0.8 + 0.01 * math.log(1.2), 0.8 - math.expm1(0.3) / math.expm1(1))
    assert group.rewards == pytest.approx([1 + want[0] + 0.991, 1 + want[1] + 0.982])


RAISED = "the reward of task temporal_grounding raised"
LATER = "not asked, as for another group of the step reward x hung"


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (ZeroDivisionError("no such length"), {"b": f"{RAISED} ZeroDivisionError: no such length"}),
        (SystemExit(0), {"b": f"{RAISED} SystemExit: 0"}),  # not the end of the run, and not its success
        (RewardError("reward x gave nan"), {"b": "reward x gave nan"}),  # says itself who it is
        (RewardTimeoutError("reward x hung"), {"b": "reward x hung", "c": LATER}),  # else each group waits as long
    ],
)
def test_a_reward_that_raises_loses_its_group_only(make_group, capsys, error, failed):
    tasks = make_tasks(TaskConfig())
    real = tasks["temporal_grounding"].score

    def fragile(examples, answers):
        if any(example.id == "b" for example in examples):
            raise error
        return real(examples, answers)

    tasks["temporal_grounding"].score = fragile
    scored = score_groups([make_group(name, GOOD, BAD) for name in "abc"], tasks, TaskConfig())
    assert [g.prompt.example.id for g in scored.groups] == [name for name in "abc" if name not in failed]
    assert scored.failures == tuple(RewardFailure(name, "temporal_grounding", why) for name, why in failed.items())
    assert f"reward failure: b: {failed['b']}\n" in capsys.readouterr().err
