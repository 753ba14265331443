"""rewards.jsonl: what one run writes and another one chooses examples by."""

import json
from dataclasses import replace

import pytest
import torch

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.difficulty import log_rewards, read_rewards, select_by_reward
from vcr1_fast.settings.config import ConfigError, DataConfig
from vcr1_fast.types import Completion, Example, IntervalTruth, RolloutGroup


def example(name: str) -> Example:
    return Example(name, "temporal_grounding", f"{name}.mp4", "q", 8.0, IntervalTruth(((1.0, 2.0),)))


def test_a_run_writes_the_mean_of_the_sampled_answers(make_prompt, tmp_path):
    prompt = replace(make_prompt((1, 4, 4), "text"), example=example("a"))
    drawn = Completion(torch.zeros(2, dtype=torch.long), torch.zeros(2), "stop")
    truth = Completion(torch.zeros(2, dtype=torch.long), torch.full((2,), torch.nan), "stop")
    group = RolloutGroup(prompt, (drawn, drawn, truth), 1, rewards=(0.5, 1.0, 2.0))
    path = tmp_path / "rewards.jsonl"
    log_rewards(path, 3, [group], SINGLE_PROCESS)
    log_rewards(path, 4, [], SINGLE_PROCESS)
    log_rewards(path, 5, [replace(group, rewards=(0.25, 0.25, 2.0))], SINGLE_PROCESS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"id": "a", "task": "temporal_grounding", "step": 3, "reward": 0.75},
        {"id": "a", "task": "temporal_grounding", "step": 5, "reward": 0.25},
    ]
    assert read_rewards(path) == {"a": 0.25}


def test_ends_of_the_range_are_inside_and_the_unknown_is_kept():
    rewards = {"a": 0.19, "b": 0.2, "c": 0.8, "d": 0.81}
    kept, told = select_by_reward([example(name) for name in "abcde"], rewards, (0.2, 0.8))
    assert [ex.id for ex in kept] == ["b", "c", "e"]
    assert told.endswith("left out 1 below and 1 above; 1 of those kept have no reward yet")


def test_a_range_that_leaves_nothing_and_a_file_of_other_data_are_errors():
    with pytest.raises(ConfigError, match=r"0\.5 \.\. 0\.6 leaves no example: 1 are below and 1 above"):
        select_by_reward([example("a"), example("b")], {"a": 0.1, "b": 0.9}, (0.5, 0.6))
    with pytest.raises(ConfigError, match=r"data\.rewards has no id of data\.train"):
        select_by_reward([example("a")], {"z": 0.1}, (0.0, 1.0))


@pytest.mark.parametrize(
    "line", ["{", '{"id": "a"}', '{"id": 1, "reward": 1}', '{"id": "a", "reward": NaN}', "[1]", "1"]
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "rewards.jsonl"
    path.write_text('{"id": "a", "reward": 1.0}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"rewards\.jsonl:2: wanted"):
        read_rewards(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_rewards(tmp_path / "none.jsonl")


def test_a_line_torn_by_a_kill_is_passed_over(tmp_path, capsys):
    path = tmp_path / "rewards.jsonl"
    path.write_text('{"id": "a", "reward": 0.5}\n{"id": "b", "rew')
    assert read_rewards(path) == {"a": 0.5}
    assert "cut short and is passed over" in capsys.readouterr().err


def test_a_range_upside_down_is_refused():
    with pytest.raises(ConfigError, match=r"data\.reward_range is \(1\.0, 0\.0\), wanted \[lowest, highest\]"):
        DataConfig(rewards="r", reward_range=(1.0, 0.0))
