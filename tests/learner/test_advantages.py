"""Advantages against numbers worked out by hand."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.learner.conftest import random_group
from tests.ranks import on_ranks
from vcr1_fast.learner.advantages import TaskScale, group_advantages, with_advantages
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.run.metrics import rollout_metrics
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks


def test_equal_rewards_and_single_completions_have_exactly_zero_advantage():
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary: the mean must not leave a residue
    assert group_advantages([[0.1] * 3, [0.7], []]) == [[0.0] * 3, [0.0], []]


def test_groups_carry_their_advantages():
    group = dataclasses.replace(random_group(0, (3, 4)), rewards=(0.0, 1.0), advantages=())
    [scored] = with_advantages([group], "none")
    assert scored.advantages == (-0.5, 0.5)
    assert scored.is_trainable
    assert not dataclasses.replace(scored, advantages=(0.0, 0.0)).is_trainable


def rewarded(task: str, rewards: tuple[float, ...]):
    group = random_group(0, (2,) * len(rewards))
    example = dataclasses.replace(group.prompt.example, task=task)
    prompt = dataclasses.replace(group.prompt, example=example)
    parts = {"format": (0.0,) * len(rewards), "iou": rewards}
    return dataclasses.replace(group, prompt=prompt, rewards=rewards, reward_parts=parts, advantages=())


def test_task_scale_by_hand():
    scale = TaskScale(decay=0.75)
    first = [rewarded("a", (0.0, 1.0)), rewarded("b", (0.2, 0.4))]
    scale.update(first, ("a", "b", "c"), SINGLE_PROCESS)
    # a: mean 0.5, mean square 0.5, variance 0.25; b: 0.3, (0.04 + 0.16) / 2 = 0.1, variance 0.01; c had no answer
    assert scale.moments == {"a": (0.5, 0.5), "b": pytest.approx((0.3, 0.1))}
    assert (scale.std("a"), scale.std("b")) == pytest.approx((0.5, 0.1))
    one, two = with_advantages(first, "task", scale)
    assert one.advantages == pytest.approx((-0.5 / 0.500001, 0.5 / 0.500001))
    assert two.advantages == pytest.approx((-0.1 / 0.100001, 0.1 / 0.100001))

    scale.update([rewarded("a", (1.0, 1.0))], ("a", "b", "c"), SINGLE_PROCESS)
    # a: 0.75 x 0.5 + 0.25 x 1 = 0.625 twice, variance 0.625 - 0.390625 = 0.234375; b as before
    assert scale.moments["a"] == (0.625, 0.625)
    assert scale.std("a") == pytest.approx(math.sqrt(0.234375))
    assert scale.metrics() == {"advantage_scale/a": scale.std("a"), "advantage_scale/b": pytest.approx(0.1)}
    resumed = TaskScale(0.75, {task: list(pair) for task, pair in scale.moments.items()})
    assert resumed.moments == scale.moments


def test_task_scale_falls_back_to_the_group_where_it_would_blow_up():
    # 0.75 / (0.05 + 1e-6) = 15 > 5; squares 0.5625 + 3 x 0.0625 over 4 answers: the population's std is sqrt(0.1875),
    # not the unbiased 0.5. 0.2 / 0.050001 = 4.0 stays.
    own = math.sqrt(0.1875) + 1e-6
    assert group_advantages([[0.0, 1.0, 0.0, 0.0], [0.0, 0.4], [0.3, 0.3], []], "task", [0.05] * 4) == [
        pytest.approx([-0.25 / own, 0.75 / own, -0.25 / own, -0.25 / own], rel=1e-12),
        pytest.approx([-0.2 / 0.050001, 0.2 / 0.050001], rel=1e-12),
        [0.0, 0.0],
        [],
    ]


def test_a_task_that_hardly_varies_has_the_smallest_scale():
    scale = TaskScale(decay=0.99)
    scale.update([rewarded("a", (0.5, 0.5002))], ("a",), SINGLE_PROCESS)
    assert scale.std("a") == pytest.approx(1e-3)  # its own is 1e-4
    assert group_advantages([[0.5, 0.5002]], "task", [scale.std("a")])[0][1] == pytest.approx(1e-4 / 1.001e-3)


def scale_on_two(world: World, out: str) -> None:
    """Each of two ranks has answers of one task only."""
    tasks = ("temporal_grounding", "object_tracking", "video_quality")
    own = [
        [rewarded("temporal_grounding", (0.0, 1.0)), rewarded("temporal_grounding", (0.5, 0.5))],
        [rewarded("object_tracking", (0.2, 0.4))],
    ][world.rank]
    scale = TaskScale(decay=0.5)
    scale.update(own, tasks, world)
    scale.update(own if world.rank == 0 else [], tasks, world)
    advantages = [list(g.advantages) for g in with_advantages(own, "task", scale)]
    metrics = rollout_metrics(own, make_tasks(TaskConfig()), world)
    result = {"moments": scale.moments, "advantages": advantages, "metrics": metrics}
    Path(f"{out}.{world.rank}").write_text(json.dumps(result))


def test_two_ranks_with_one_task_each_agree_on_scale_and_metrics(tmp_path):
    on_ranks(scale_on_two, tmp_path / "out")
    zero, one = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert zero["moments"] == one["moments"]
    assert zero["metrics"] == one["metrics"]
    # grounding, twice the same: mean 0.5, mean square (0 + 1 + 0.25 + 0.25) / 4 = 0.375, std sqrt(0.125)
    assert zero["moments"]["temporal_grounding"] == [0.5, 0.375]
    # tracking: 0.3 and 0.1 from its only step
    assert zero["moments"]["object_tracking"] == pytest.approx([0.3, 0.1])
    assert "video_quality" not in zero["moments"]
    std = math.sqrt(0.125) + 1e-6
    assert zero["advantages"] == [pytest.approx([-0.5 / std, 0.5 / std]), [0.0, 0.0]]
    assert one["advantages"] == [pytest.approx([-0.1 / 0.100001, 0.1 / 0.100001])]
    assert zero["metrics"]["rewards/temporal_grounding/iou/mean"] == 0.5
    assert zero["metrics"]["rewards/object_tracking/iou/mean"] == pytest.approx(0.3)
    assert zero["metrics"]["completions/count"] == 6
