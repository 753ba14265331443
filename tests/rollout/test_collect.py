"""A step's groups: ground truths among the answers, further prompts, steps without a score."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import build_tokenizer, make_patches
from tests.ranks import on_ranks
from tests.rollout.collecting import collected
from tests.rollout.scripted_engine import ScriptedEngine
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.rollout.collect import Collector, RewardsFailedError, collect
from vcr1_fast.run.metrics import rollout_metrics
from vcr1_fast.settings.config import Config, ConfigError, RolloutConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.scoring import Scored
from vcr1_fast.types import Example, IntervalTruth, Prompt, SampleError, SamplingParams

GOOD, BAD = (f"<think>x</think><answer>{answer}</answer>" for answer in ("2.00 to 4.00", "none"))


def make_example(name: str) -> Example:
    return Example(name, "temporal_grounding", f"{name}.mp4", "a red circle appears", 8.0, IntervalTruth(((2.0, 4.0),)))


def prompts_of(make_prompt, *names):
    return [dataclasses.replace(make_prompt((1, 4, 4), "text"), example=make_example(name)) for name in names]


def test_no_prompts_no_groups(tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, {})
    assert collect(engine, [], SamplingParams(2, 8), {}, TaskConfig()) == Scored([])


def no_more(count: int) -> list[Prompt]:
    raise AssertionError(f"{count} further prompts were asked for")


def make_collector(
    tiny_tokenizer, scripts, tasks=None, task_config=None, **rollout
) -> tuple[Collector, ScriptedEngine]:
    engine = ScriptedEngine(tiny_tokenizer, scripts)
    config = Config(rollout=RolloutConfig(group_size=2, **rollout), task=task_config or TaskConfig())
    tasks = tasks or make_tasks(TaskConfig())

    def target_ids(example):
        if example.id == "forged":
            raise SampleError("forged", "its text would become a control token")
        return torch.tensor(tiny_tokenizer(tasks[example.task].target(example))["input_ids"])

    return Collector(tasks, config, SINGLE_PROCESS, target_ids), engine


def test_the_ground_truth_replaces_one_answer_and_is_scored_like_the_others(tiny_tokenizer, make_prompt):
    collector, engine = make_collector(tiny_tokenizer, {"a": [BAD]}, num_ground_truth=1)  # one script: G - 1 are drawn
    [group] = collected(collector, engine, prompts_of(make_prompt, "a"), SamplingParams(2, 200), no_more)
    drawn, truth = group.completions
    assert (drawn.is_sampled, truth.is_sampled) == (True, False)
    assert truth.text == "<think></think><answer>2.00 to 4.00</answer>"
    assert tiny_tokenizer.decode(truth.token_ids_R) == truth.text
    assert group.reward_parts["iou"] == (0.0, 1.0)
    assert group.rewards == (0.0, 2.0)
    assert collector.metrics() == {"reward_failures": 0.0, "sampling/ground_truths": 1.0}
    metrics = rollout_metrics([group], collector.tasks, SINGLE_PROCESS)
    # means are of the one drawn answer; the spread is of both, as advantages see it
    assert (metrics["reward"], metrics["completions/count"]) == (0.0, 1.0)
    assert metrics["rewards/temporal_grounding/iou/mean"] == 0.0
    assert metrics["reward_std"] == pytest.approx(math.sqrt(2.0))


def test_a_ground_truth_that_cannot_be_used_is_left_out(tiny_tokenizer, make_prompt, capsys):
    collector, engine = make_collector(tiny_tokenizer, {"a": [BAD], "forged": [BAD]}, num_ground_truth=1)
    groups = collected(collector, engine, prompts_of(make_prompt, "a", "forged"), SamplingParams(2, 10), no_more)
    assert [len(group.completions) for group in groups] == [1, 1]  # 10 tokens are too few for the target of "a"
    assert "no ground truth in the group: forged" in capsys.readouterr().err
    assert collector.metrics()["sampling/ground_truths"] == 0.0


def test_groups_without_a_signal_are_replaced_by_further_prompts(tiny_tokenizer, make_prompt):
    flat, rich = [GOOD, GOOD], [GOOD, BAD]
    collector, engine = make_collector(
        tiny_tokenizer, {"a": rich, "b": flat, "c": flat, "d": flat, "e": rich, "f": flat}, max_resample_rounds=2
    )
    asked: list[int] = []
    upcoming = iter(prompts_of(make_prompt, *"def"))

    def next_prompts(count):
        asked.append(count)
        return [next(upcoming) for _ in range(count)]

    groups = collected(collector, engine, prompts_of(make_prompt, *"abc"), SamplingParams(2, 200), next_prompts)
    # b and c give way to d and e, d to f; the rounds are over, f stays
    assert asked == [2, 1]
    assert [group.prompt.example.id for group in groups] == ["a", "e", "f"]
    assert collector.metrics() == {"reward_failures": 0.0, "sampling/resampled_groups": 3.0}


def test_rounds_draw_with_different_seeds_and_the_same_ones_again(tiny_tokenizer, make_prompt):
    def seeds() -> list[int]:
        collector, engine = make_collector(tiny_tokenizer, {"a": [BAD, BAD]}, max_resample_rounds=2)
        generate, seen = engine.generate, []

        def spy(prompts, sampling):
            seen.append(sampling.seed)
            return generate(prompts, sampling)

        engine.generate = spy
        collected(
            collector,
            engine,
            prompts_of(make_prompt, "a"),
            SamplingParams(2, 200, seed=7),
            lambda _: prompts_of(make_prompt, "a"),
        )
        return seen

    assert len(set(seeds())) == 3
    assert seeds() == seeds()
    assert seeds()[0] == 7


def test_steps_without_a_score_are_counted_task_by_task_and_end_the_run(tiny_tokenizer, make_prompt):
    """Of three steps in a row: the grounding judge is back in the second, the tracking one never."""
    tasks = make_tasks(TaskConfig())
    is_down = {"temporal_grounding": True, "object_tracking": True}

    def score_of(name):
        def score(examples, answers):
            if is_down[name]:
                raise ConnectionError(f"the judge of {examples[0].id} is down")
            return {"iou": [1.0] * len(answers)}

        return score

    for name in is_down:
        tasks[name].score = score_of(name)
    collector, engine = make_collector(
        tiny_tokenizer, {name: [GOOD, BAD] for name in "abc"}, tasks, TaskConfig(max_failed_steps=3)
    )
    prompts = prompts_of(make_prompt, *"abc")
    prompts[2] = dataclasses.replace(prompts[2], example=dataclasses.replace(make_example("c"), task="object_tracking"))

    def step() -> list[str]:
        groups = collected(collector, engine, prompts, SamplingParams(2, 200), no_more)
        return [group.prompt.example.id for group in groups]

    assert step() == []
    assert collector.failed_ids == ["c", "a", "b"]  # object_tracking is asked first
    assert collector.metrics() == {"reward_failures": 3.0}
    assert collector.failed_steps == {"": 1, "object_tracking": 1, "temporal_grounding": 1}
    is_down["temporal_grounding"] = False
    assert step() == ["a", "b"]
    assert collector.failed_ids == ["c"]
    assert collector.metrics() == {"reward_failures": 1.0}
    assert collector.failed_steps == {"object_tracking": 2}
    asked, prompts = prompts, prompts[:2]
    collector.config = Config(task=TaskConfig(max_failed_steps=2))  # lowered for a resumed run
    assert step() == ["a", "b"]  # nothing was asked of object_tracking, so that nothing failed
    prompts = asked
    with pytest.raises(
        RewardsFailedError, match=r"task object_tracking: no group could be scored in 3 steps"
    ) as caught:
        step()
    assert "the last error: c: the reward of task object_tracking raised ConnectionError: the judge of c" in str(
        caught.value
    )


START = (["flat-0", "flat-1", "flat-2", "good-0"], ["good-0", "good-1", "good-2", "good-3"])
FURTHER = [  # of each rank: the share of each of the two rounds
    (["round1-0", "round1-flat"], ["round2-0", "round2-1"]),
    (["round1-flat", "round1-flat"], ["round2-0", "round2-1"]),
]


def resample(world: World, out: str) -> None:
    """Dynamic sampling where the ranks lack different numbers of groups; then rewards fail."""
    tokenizer, tasks = build_tokenizer(), make_tasks(TaskConfig())
    builder = PromptBuilder(tokenizer, tasks, lambda _: make_patches((1, 4, 4)))
    names = [*START[world.rank], *(name for share in FURTHER[world.rank] for name in share)]
    scripts = {name: [GOOD, GOOD if "flat" in name else BAD] for name in names}
    asked: list[int] = []

    def prompts_of(names: list[str]) -> list[Prompt]:
        return [builder.build(make_example(name)) for name in names]

    def next_prompts(count: int) -> list[Prompt]:
        asked.append(count)
        return prompts_of(FURTHER[world.rank][len(asked) - 1])

    config = Config(rollout=RolloutConfig(group_size=2, max_resample_rounds=4))
    collector = Collector(tasks, config, world, builder.completion_ids)
    engine = ScriptedEngine(tokenizer, scripts)
    groups = collected(collector, engine, prompts_of(START[world.rank]), SamplingParams(2, 200), next_prompts)
    real, broken = tasks["temporal_grounding"].score, {"good-3"}

    def fragile(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        if broken & {example.id for example in examples}:
            raise ConnectionError("the judge is down")
        return real(examples, answers)

    tasks["temporal_grounding"].score = fragile  # type: ignore[method-assign]
    config = Config(rollout=RolloutConfig(group_size=2), task=TaskConfig(max_failed_steps=1))
    failing = Collector(tasks, config, world, builder.completion_ids)
    start = prompts_of(START[world.rank])
    scored = collected(failing, engine, start, SamplingParams(2, 200), next_prompts)
    failed = failing.failed_ids
    broken |= {*START[0], *START[1]}
    error = ""
    try:
        collected(failing, engine, start, SamplingParams(2, 200), next_prompts)
    except RewardsFailedError as caught:
        error = str(caught)
    ids = [group.prompt.example.id for group in scored]
    result = {"failed": failed, "scored": ids, "error": error}
    result |= {"asked": asked, "kept": [g.prompt.example.id for g in groups], "metrics": collector.metrics()}
    Path(f"{out}.{world.rank}").write_text(json.dumps(result))


def test_two_ranks_resample_in_step(tmp_path):
    on_ranks(resample, tmp_path / "out")
    zero, one = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    # Rank 0 begins with 3 groups without a signal, rank 1 with none: 4 further prompts, 2 each. Of these rank 0 gets
    # one without and rank 1 two: 3, so 4 further prompts again, all good.
    assert zero["asked"] == one["asked"] == [4, 4]
    assert zero["kept"] == ["good-0", "round1-0", "round2-0", "round2-1"]
    assert one["kept"] == ["good-0", "good-1", "good-2", "good-3", "round2-0", "round2-1"]
    assert zero["metrics"] == one["metrics"] == {"reward_failures": 0.0, "sampling/resampled_groups": 6.0}
    # Then rewards fail, for one group of rank 1, and for all but that of rank 0: with max_failed_steps 1 the end.
    assert zero["failed"] == one["failed"] == ["good-3"]
    assert zero["scored"] == ["flat-0", "flat-1", "flat-2", "good-0"] and one["scored"] == [
        "good-0",
        "good-1",
        "good-2",
    ]
    assert zero["error"] == one["error"]
    assert (
        "all tasks: no group could be scored in 1 steps" in zero["error"]
        and "the last error: good-3: " in zero["error"]
    )


def test_a_group_holds_one_ground_truth_at_most():
    with pytest.raises(ConfigError, match=r"rollout\.num_ground_truth is 2, wanted 0 or 1"):
        RolloutConfig(num_ground_truth=2)
