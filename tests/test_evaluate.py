"""Held-out scores: failures stay in the denominator, baselines stand beside them."""

import pytest
import torch

from vcr1_fast.config import Config, EvalConfig, TaskConfig
from vcr1_fast.evaluate import evaluate, flat_scores
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example, IntervalTruth, Patches, SampleError, TrackTruth

BOX = (0.2, 0.2, 0.4, 0.4)


def read(path: str) -> Patches:
    if path == "bad.mp4":
        raise SampleError(path, "the file is empty")
    return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 1.0)


def grounding(name: str, video: str = "a.mp4") -> Example:
    return Example(name, "temporal_grounding", video, "a dog barks", 8.0, IntervalTruth(((2.0, 4.0),)))


def score(tiny_tokenizer, examples, answers, **options):
    tasks = make_tasks(TaskConfig())
    engine = ScriptedEngine(tiny_tokenizer, answers)
    builder = PromptBuilder(tiny_tokenizer, tasks, read)
    return evaluate(engine, examples, builder, tasks, Config(eval=EvalConfig(**options)), SINGLE_PROCESS)


def test_an_unreadable_video_counts_as_wrong(tiny_tokenizer, capsys):
    right = "<think>x</think><answer>2.00 to 4.00</answer>"
    half = "<think>x</think><answer>2.00 to 3.00</answer>"
    examples = [grounding("a"), grounding("b", "bad.mp4"), grounding("c")]
    scores = score(tiny_tokenizer, examples, {"a": [right], "c": [half]})["temporal_grounding"]
    assert scores.metrics["miou"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert scores.metrics["r@0.7"] == pytest.approx(1 / 3)
    assert (scores.num_examples, scores.num_bad) == (3, 1)
    assert "bad held-out sample, counted as wrong: bad.mp4: the file is empty" in capsys.readouterr().err


def test_baselines_and_tasks_are_kept_apart(tiny_tokenizer):
    track = Example("t", "object_tracking", "a.mp4", "dog", 8.0, TrackTruth((BOX, BOX), (0.0, 4.0)))
    answers = {"a": ["nothing"], "t": ["<think></think><answer>[[0.2,0.2,0.4,0.4],[0.2,0.2,0.4,0.4]]</answer>"]}
    scores = score(tiny_tokenizer, [grounding("a"), track], answers)
    assert list(scores) == ["temporal_grounding", "object_tracking"]
    assert scores["temporal_grounding"].metrics["miou"] == 0.0
    assert scores["temporal_grounding"].trivial["whole_video"]["miou"] == pytest.approx(2 / 8)
    assert scores["object_tracking"].metrics["mean_overlap"] == pytest.approx(1.0)
    assert scores["object_tracking"].trivial["repeat_first_box"]["mean_overlap"] == pytest.approx(1.0)
    assert flat_scores(scores)["object_tracking/mean_overlap"] == pytest.approx(1.0)


def test_max_examples_takes_the_first_of_each_task(tiny_tokenizer):
    examples = [grounding(name) for name in "abc"]
    scores = score(tiny_tokenizer, examples, {name: ["x"] for name in "ab"}, max_examples=2)
    assert scores["temporal_grounding"].num_examples == 2
