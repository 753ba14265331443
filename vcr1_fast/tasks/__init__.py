"""The tasks by name. A new one is one file with a class that fulfils `task.Task`, and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vcr1_fast.config import ConfigError, TaskConfig
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding

TASKS: dict[str, type[Task]] = {
    TemporalGrounding.name: TemporalGrounding,
    ObjectTracking.name: ObjectTracking,
}


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises ValueError that names the nearest task there is."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{_nearest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def make_tasks(config: TaskConfig, names: Iterable[str] = tuple(TASKS)) -> dict[str, Task]:
    """Name -> task for the named tasks (all of them by default).

    Raises ValueError for an unknown task, ConfigError when reward_weights names a part that no task has.
    """
    parts = sorted({part for task in TASKS.values() for part in task.part_names})
    for part in config.reward_weights:
        if part not in parts:
            raise ConfigError(
                f"task.reward_weights.{part}: no task has this part{_nearest(part, parts)}; "
                f"the parts are {', '.join(parts)}"
            )
    return {name: task_class(name)(config) for name in names}


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
