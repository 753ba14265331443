"""The stream of training prompts: every item once per epoch, bad samples set aside, on any number of ranks."""

import json

import pytest
import torch

from vcr1_fast.config import Config, ConfigError, DataConfig, TaskConfig, TrainConfig
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.stream import PromptStream, TooManyBadSamplesError
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example, IntervalTruth, LabelTruth, Patches, SampleError
from vcr1_fast.video.quarantine import Quarantine


def read(path: str) -> Patches:
    if "bad" in path:
        raise SampleError(path, "the file is empty")
    return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 1.0)


def make_stream(tiny_tokenizer, tmp_path, videos, world=SINGLE_PROCESS, data=None, **train) -> PromptStream:
    examples = [
        Example(f"e{i}", "temporal_grounding", video, "a dog barks", 8.0, IntervalTruth(((1.0, 2.0),)))
        for i, video in enumerate(videos)
    ]
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), read)
    config = Config(train=TrainConfig(prompts_per_step=4, **train), data=data or DataConfig())
    return PromptStream(examples, builder, Quarantine(tmp_path / "quarantine.jsonl"), config, world)


def ids(prompts) -> list[str]:
    return [prompt.example.id for prompt in prompts]


def test_an_epoch_holds_every_item_once(tiny_tokenizer, tmp_path):
    stream = make_stream(tiny_tokenizer, tmp_path, [f"v{i}.mp4" for i in range(10)])
    seen = ids(stream.next(4) + stream.next(4) + stream.next(2))
    assert sorted(seen) == sorted(f"e{i}" for i in range(10))
    assert stream.epoch == 1.0


def test_position_is_the_only_state(tiny_tokenizer, tmp_path):
    videos = [f"v{i}.mp4" for i in range(7)]
    first = make_stream(tiny_tokenizer, tmp_path, videos)
    for _ in range(3):
        first.next(4)
    second = make_stream(tiny_tokenizer, tmp_path, videos)
    second.position = 12
    assert ids(first.next(4)) == ids(second.next(4))


def test_a_bad_video_is_quarantined_once_and_the_rest_goes_on(tiny_tokenizer, tmp_path, capsys):
    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4", "bad.mp4", "b.mp4", "c.mp4"])
    assert sorted(ids(stream.next(4))) == ["e0", "e2", "e3"]
    assert sorted(ids(stream.next(4))) == ["e0", "e2", "e3"]  # second epoch: known bad, not read again
    assert stream.num_bad == 2
    assert capsys.readouterr().err == "bad sample: bad.mp4: the file is empty\n"
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 1


def test_too_many_bad_samples_stop_the_run_with_a_reason(tiny_tokenizer, tmp_path):
    stream = make_stream(tiny_tokenizer, tmp_path, ["bad1.mp4", "bad2.mp4", "a.mp4"], max_bad_sample_frac=0.5)
    for _ in range(4):
        stream.next(4)
    with pytest.raises(TooManyBadSamplesError, match=r"13 of 20 samples could not be used, more than .* 0\.5"):
        stream.next(4)


def test_no_examples_is_an_error(tiny_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no usable example"):
        make_stream(tiny_tokenizer, tmp_path, [])


def test_tasks_are_mixed_by_weight_and_their_epochs_reported(tiny_tokenizer, tmp_path):
    truths = [("temporal_grounding", IntervalTruth(((1.0, 2.0),)))] * 3 + [("video_quality", LabelTruth("low"))] * 5
    examples = [Example(f"e{i}", task, f"v{i}.mp4", "a dog", 8.0, truth) for i, (task, truth) in enumerate(truths)]
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), read)
    data = DataConfig(mixture={"temporal_grounding": 3.0, "video_quality": 1.0})
    config = Config(train=TrainConfig(prompts_per_step=4), data=data)
    stream = PromptStream(examples, builder, Quarantine(None), config, SINGLE_PROCESS)
    tasks = [prompt.example.task for _ in range(25) for prompt in stream.next(4)]
    assert tasks.count("temporal_grounding") == 75
    metrics = stream.metrics()
    assert metrics == {
        "epoch": 100 / 8, "epoch/temporal_grounding": 25.0, "epoch/video_quality": 5.0, "bad_samples": 0.0
    }  # fmt: skip


def test_examples_outside_the_reward_range_are_left_out(tiny_tokenizer, tmp_path, capsys):
    rewards = {"e0": 0.1, "e1": 0.5, "e2": 1.0, "e3": 1.9}
    lines = [json.dumps({"id": name, "reward": reward}) + "\n" for name, reward in rewards.items()]
    (tmp_path / "rewards.jsonl").write_text("".join(lines))
    data = DataConfig(rewards=str(tmp_path / "rewards.jsonl"), reward_range=(0.5, 1.0))
    stream = make_stream(tiny_tokenizer, tmp_path, [f"v{i}.mp4" for i in range(5)], data=data)
    assert sorted(ids(stream.next(3))) == ["e1", "e2", "e4"]
    assert capsys.readouterr().err == (
        "data.reward_range: 3 examples; left out 1 below and 1 above; 1 of those kept have no reward yet\n"
    )
