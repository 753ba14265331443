"""T-GRPO: what is shuffled, and who earns the part for order."""

import dataclasses

import pytest
import torch

from tests.rollout.collecting import collected
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.rollout.collect import Collector
from vcr1_fast.run.metrics import rollout_metrics
from vcr1_fast.settings.config import Config, RolloutConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.temporal_contrast import has_order, order_part, shuffled_prompt
from vcr1_fast.types import Completion, Example, IntervalTruth, RolloutGroup, SamplingParams

RIGHT, HALF, WRONG = (
    f"<think>x</think><answer>{answer}</answer>" for answer in ("2.00 to 4.00", "2.00 to 3.00", "none")
)


def test_the_order_always_changes_where_it_can(make_prompt):
    for seed in range(20):  # half of the permutations of two pairs are no change
        prompt = make_prompt((2, 4, 4), "text", seed=seed)
        first, second = prompt.media[0].values_PC.chunk(2)
        assert torch.equal(shuffled_prompt(prompt, seed).media[0].values_PC, torch.cat([second, first]))
    single = make_prompt((1, 4, 4), "text")
    assert torch.equal(shuffled_prompt(single, 0).media[0].values_PC, single.media[0].values_PC)


def test_each_video_is_shuffled_by_whole_pairs_and_images_stay(make_prompt):
    first, image, second = (make_prompt(grid, "t", seed=5).media[0] for grid in ((4, 4, 4), (1, 4, 4), (5, 4, 4)))
    image = dataclasses.replace(image, kind="image")
    prompt = dataclasses.replace(make_prompt((1, 4, 4), "t"), media=(first, image, second))
    got, again = shuffled_prompt(prompt, seed=1), shuffled_prompt(prompt, seed=1)
    assert got.token_ids_L is prompt.token_ids_L and got.position_ids_3L is prompt.position_ids_3L
    assert torch.equal(got.media[1].values_PC, image.values_PC)
    for before, after, same in zip((first, second), got.media[::2], again.media[::2], strict=True):
        pairs = [p.values_PC.unflatten(0, (p.grid_thw[0], -1)).sum((1, 2)).tolist() for p in (before, after)]
        assert sorted(pairs[0]) == sorted(pairs[1]) and pairs[0] != pairs[1]
        assert torch.equal(after.values_PC, same.values_PC)
    assert has_order(prompt)
    assert not any(has_order(dataclasses.replace(prompt, media=media)) for media in ((), (image,)))


def test_order_part_by_hand(make_prompt):
    answer = Completion(torch.zeros(2, dtype=torch.long), torch.zeros(2), "stop")
    truth = dataclasses.replace(answer, logprobs_R=torch.full((2,), torch.nan))
    parts = {"format": (1.0, 1.0, 0.0), "iou": (0.8, 0.0, 0.2), "length": (0.0, 1.0, 1.0)}
    group = RolloutGroup(make_prompt((2, 4, 4), "text"), (answer,) * 3, 1, parts)
    # in order (0.8 + 0 + 0.2) / 3 = 1/3; shuffled 0.41: 0.8 x 0.41 = 0.328 is less, 0.8 x 0.42 = 0.336 is more
    assert order_part(group, {"iou": (0.41,)}) == (1.0, 0.0, 1.0)
    assert order_part(group, {"iou": (0.42,)}) == (0.0, 0.0, 0.0)
    # a ground truth says nothing about the policy: without the 0.8 the mean is 0.1, 0.8 x 0.2 = 0.16 is more
    mixed = dataclasses.replace(group, completions=(truth, answer, answer))
    assert order_part(mixed, {"iou": (0.2,)}) == (0.0, 0.0, 0.0)
    assert order_part(mixed, {"iou": (0.12,)}) == (1.0, 0.0, 1.0)


class ByOrder:
    """An engine that answers one way to the clip as it is and another way to any other."""

    policy_version = 0

    def __init__(self, clips, in_order, shuffled) -> None:
        self.clips, self.in_order, self.shuffled = clips, in_order, shuffled
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompts, sampling):
        self.asked.append((len(prompts), sampling.num_completions))
        is_in_order = [all(any(shown is clip for clip in self.clips) for shown in prompt.media) for prompt in prompts]
        texts = [self.in_order if ok else self.shuffled for ok in is_in_order]
        return [
            [Completion(torch.zeros(3, dtype=torch.long), torch.zeros(3), "stop", text) for text in group]
            for group in ([t[i % len(t)] for i in range(sampling.num_completions)] for t in texts)
        ]


def contrasting(make_prompt, engine_answers, **settings):
    """A prompt, an engine that answers to it in order and shuffled, and what collects the groups."""
    example = Example("a", "temporal_grounding", "a.mp4", "a door opens", 8.0, IntervalTruth(((2.0, 4.0),)))
    prompt = dataclasses.replace(make_prompt((3, 4, 4), "text"), example=example)
    config = TaskConfig(temporal_contrast=True, **settings)
    whole = Config(rollout=RolloutConfig(group_size=4), task=config)
    collector = Collector(make_tasks(config), whole, SINGLE_PROCESS, lambda _: torch.zeros(0))
    return prompt, ByOrder([prompt.media[0]], *engine_answers), collector


@pytest.mark.parametrize(("shuffled", "part"), [(WRONG, (1.0, 0.0, 1.0, 0.0)), (RIGHT, (0.0, 0.0, 0.0, 0.0))])
def test_correct_answers_earn_the_part_only_where_order_helps(make_prompt, shuffled, part):
    weights = {"order": 0.3}
    prompt, engine, collector = contrasting(make_prompt, ([HALF, WRONG], [shuffled]), reward_weights=weights)
    text = dataclasses.replace(prompt, media=())  # answered, and nothing to shuffle
    group, plain = collected(collector, engine, [text, prompt], SamplingParams(4, 9), lambda _: [])
    assert plain.prompt is text and "order" not in plain.reward_parts and len(plain.rewards) == 4
    assert engine.asked == [(2, 4), (1, 2)]
    assert len(group.completions) == 4
    assert group.reward_parts["order"] == part  # 0.25 in order against 0, or against 0.8 x 1
    assert group.rewards == tuple(b + 0.3 * p for b, p in zip((1.5, 0.0, 1.5, 0.0), part, strict=True))
    metrics = rollout_metrics([group], collector.tasks, SINGLE_PROCESS)
    assert metrics["rewards/temporal_grounding/order/mean"] == sum(part) / 4


def test_a_group_is_scored_with_its_shuffled_clip_or_not_at_all(make_prompt, monkeypatch):
    prompt, engine, collector = contrasting(make_prompt, ([HALF], [WRONG]))
    task = collector.tasks["temporal_grounding"]
    real = task.score

    def fragile(examples, answers):
        if WRONG in answers:
            raise ZeroDivisionError("no such length")
        return real(examples, answers)

    monkeypatch.setattr(task, "score", fragile)
    assert collected(collector, engine, [prompt], SamplingParams(4, 9), lambda _: []) == []
    assert collector.failed_ids == ["a"]
