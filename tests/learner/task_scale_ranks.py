"""Run by test_advantages on each of two ranks, each of which has answers of one task only."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.learner.conftest import random_group
from vcr1_fast.learner.advantages import TaskScale, with_advantages
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown
from vcr1_fast.run.metrics import rollout_metrics
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import RolloutGroup

TASKS = ("temporal_grounding", "object_tracking", "video_quality")


def group_of(task: str, rewards: tuple[float, ...]) -> RolloutGroup:
    group = random_group(0, (2,) * len(rewards))
    example = replace(group.prompt.example, task=task)
    parts = {"format": (0.0,) * len(rewards), "iou": rewards}
    return replace(group, prompt=replace(group.prompt, example=example), rewards=rewards, reward_parts=parts)


def main() -> None:
    world = init_distributed("cpu")
    own = [
        [group_of("temporal_grounding", (0.0, 1.0)), group_of("temporal_grounding", (0.5, 0.5))],
        [group_of("object_tracking", (0.2, 0.4))],
    ][world.rank]
    scale = TaskScale(decay=0.5)
    scale.update(own, TASKS, world)
    scale.update(own if world.rank == 0 else [], TASKS, world)
    advantages = [list(g.advantages) for g in with_advantages(own, "task", scale)]
    metrics = rollout_metrics(own, make_tasks(TaskConfig()), world)
    result = {"moments": scale.moments, "advantages": advantages, "metrics": metrics}
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(result))
    shutdown(world)
    exit_rank(0)


main()
