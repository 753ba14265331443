"""Scoring of a step's answers, and what happens when a reward breaks."""

import pytest

from vcr1_fast.config import TaskConfig
from vcr1_fast.rollout.collect import collect, weighted_sum
from vcr1_fast.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example, IntervalTruth, SampleError, SamplingParams

GOOD, HALF, BAD = (f"<think>x</think><answer>{answer}</answer>" for answer in ("2.00 to 4.00", "2.00 to 3.00", "none"))


def make_example(name: str) -> Example:
    return Example(name, "temporal_grounding", f"{name}.mp4", "a red circle appears", 8.0, IntervalTruth(((2.0, 4.0),)))


def prompts_of(make_prompt, *names):
    import dataclasses

    return [dataclasses.replace(make_prompt((1, 4, 4), "text"), example=make_example(name)) for name in names]


def test_each_group_gets_the_scores_of_its_own_answers(tiny_tokenizer, make_prompt):
    engine = ScriptedEngine(tiny_tokenizer, {"a": [GOOD, BAD], "b": [HALF, GOOD]})
    groups = collect(
        engine,
        prompts_of(make_prompt, "a", "b"),
        SamplingParams(2, 200),
        make_tasks(TaskConfig()),
        TaskConfig(reward_weights={"iou": 2.0}),
        pytest.fail,
    )
    assert [g.prompt.example.id for g in groups] == ["a", "b"]
    assert [g.reward_parts["iou"] for g in groups] == [(1.0, 0.0), (0.5, 1.0)]
    assert [g.reward_parts["format"] for g in groups] == [(1.0, 0.0), (1.0, 1.0)]
    assert [g.rewards for g in groups] == [(3.0, 0.0), (2.0, 3.0)]


def test_a_reward_that_raises_loses_its_group_only(tiny_tokenizer, make_prompt, capsys):
    tasks = make_tasks(TaskConfig())
    real = tasks["temporal_grounding"].score

    def fragile(examples, answers):
        if any(example.id == "b" for example in examples):
            raise ZeroDivisionError("no such length")
        return real(examples, answers)

    tasks["temporal_grounding"].score = fragile
    failures: list[SampleError] = []
    engine = ScriptedEngine(tiny_tokenizer, {name: [GOOD, BAD] for name in "abc"})
    groups = collect(
        engine, prompts_of(make_prompt, *"abc"), SamplingParams(2, 200), tasks, TaskConfig(), failures.append
    )
    assert [g.prompt.example.id for g in groups] == ["a", "c"]
    assert [str(f) for f in failures] == [
        "b: the reward of task temporal_grounding raised ZeroDivisionError: no such length"
    ]
    assert "reward failure: b" in capsys.readouterr().err


def test_no_prompts_no_groups(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, {})
    assert collect(engine, [], SamplingParams(2, 8), {}, TaskConfig(), pytest.fail) == []


def test_weighted_sum_by_hand():
    assert weighted_sum({"format": (1.0, 0.0), "iou": (0.5, 0.25)}, {"iou": 4.0}) == (3.0, 1.0)
