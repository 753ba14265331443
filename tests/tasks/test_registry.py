"""Tasks by name."""

import pytest

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import TASKS, make_tasks, task_class
from vcr1_fast.tasks.object_tracking import ObjectTracking


def test_every_task_is_made_under_its_own_name():
    tasks = make_tasks(TaskConfig())
    assert list(tasks) == list(TASKS)
    assert {
        "temporal_grounding": ("format", "iou"),
        "object_tracking": ("format", "iou"),
        "grounded_qa": ("format", "iou", "accuracy"),
        "multiple_choice": ("format", "accuracy"),
        "video_quality": ("format", "accuracy"),
        "numeric_answer": ("format", "accuracy"),
    }.items() <= {name: task.part_names for name, task in tasks.items()}.items()
    assert all(task.name == name for name, task in tasks.items())
    assert list(make_tasks(TaskConfig(), ["object_tracking"])) == ["object_tracking"]
    assert task_class("object_tracking") is ObjectTracking


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="no task 'temporal_ground', did you mean 'temporal_grounding'"):
        make_tasks(TaskConfig(), ["temporal_ground"])
    with pytest.raises(
        ValueError, match="no task 'zzz'; the tasks are temporal_grounding, object_tracking, grounded_qa"
    ):
        task_class("zzz")


def test_a_weight_for_a_part_that_no_task_has_is_refused():
    with pytest.raises(ConfigError, match=r"task.reward_weights.fromat: .* did you mean 'format'"):
        make_tasks(TaskConfig(reward_weights={"fromat": 1.0}))
