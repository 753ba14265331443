"""The tasks by name. A new one is one file with a class that fulfils `task.Task`, and one line here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from vcr1_fast.settings.config import ConfigError, JudgeConfig, TaskConfig
from vcr1_fast.tasks.captioning import Captioning
from vcr1_fast.tasks.custom import check_tasks, load_rewards, load_tasks, make_custom, nearest
from vcr1_fast.tasks.grounded_qa import GroundedQA
from vcr1_fast.tasks.grounding_list import GroundingByList
from vcr1_fast.tasks.grounding_sentence import GroundingBySentence
from vcr1_fast.tasks.multiple_choice import MultipleChoice
from vcr1_fast.tasks.numeric_answer import NumericAnswer
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.tasks.prompt_file import wording_of
from vcr1_fast.tasks.reward_process import RewardProcess
from vcr1_fast.tasks.shaping import added_parts
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.tasks.video_quality import VideoQuality

TASKS: dict[str, type[Task]] = {
    TemporalGrounding.name: TemporalGrounding,
    ObjectTracking.name: ObjectTracking,
    GroundedQA.name: GroundedQA,
    MultipleChoice.name: MultipleChoice,
    VideoQuality.name: VideoQuality,
    NumericAnswer.name: NumericAnswer,
    Captioning.name: Captioning,
}


def task_class(name: str, classes: Mapping[str, type[Task]] = TASKS) -> type[Task]:
    """The class of a task. Raises ValueError that names the nearest task there is."""
    if name not in classes:
        raise ValueError(f"there is no task {name!r}{nearest(name, classes)}; the tasks are {', '.join(classes)}")
    return classes[name]


GROUNDING: dict[str, type[TemporalGrounding]] = {  # by task.grounding_answer
    "period": TemporalGrounding,
    "list": GroundingByList,
    "sentence": GroundingBySentence,
}


def make_tasks(
    config: TaskConfig, names: Iterable[str] | None = None, judge: JudgeConfig | None = None
) -> dict[str, Task]:
    """Name -> task for the named tasks (all of them by default), the user's own and further rewards included.

    Raises ValueError for an unknown task, ConfigError when reward_weights or shaping names a part that no task has, or
    a prompt file or something of the user's cannot be loaded.
    """
    custom = load_tasks(config.custom, taken=TASKS)
    classes = TASKS | custom
    rewards = load_rewards(config.rewards, classes)
    parts = {part for task in classes.values() for part in task.part_names}
    _check_part_names(config, parts | {part for own in rewards.values() for part in own})
    _check_prompt_tasks(config, classes)
    tasks: dict[str, Task] = {}
    for name in classes if names is None else names:
        found = task_class(name, classes)
        if found is TemporalGrounding:
            found = GROUNDING[config.grounding_answer]
        if name in custom:
            tasks[name] = make_custom(name, found, config)
        else:
            tasks[name] = Captioning(config, judge) if found is Captioning else found(config)
        if name in config.prompts and wording_of(tasks[name]) is None:
            raise ConfigError(
                f"task.prompts.{name}: this task has words of its own: leave the file out, or let the task ask with "
                "vcr1_fast.tasks.prompt_file.Wording under the name `wording`"
            )
    return check_tasks(tasks, rewards, custom, RewardProcess(config) if config.reward_timeout_s else None)


def _check_prompt_tasks(config: TaskConfig, classes: Collection[str]) -> None:
    for name in config.prompts:
        if name not in classes:
            near, known = nearest(name, classes), ", ".join(classes)
            raise ConfigError(f"task.prompts.{name}: there is no such task{near}; the tasks are {known}")


def _check_part_names(config: TaskConfig, known: Collection[str]) -> None:
    added = added_parts(config)
    if taken := sorted(added & set(known)):
        raise ConfigError(f"a task has a part {taken[0]!r} already, which the settings of task add: rename the task's")
    parts = sorted({*known} | added)
    for setting, named in (("reward_weights", config.reward_weights), ("shaping", config.shaping)):
        for part in named:
            if part not in parts:
                raise ConfigError(
                    f"task.{setting}.{part}: no task has this part{nearest(part, parts)}; "
                    f"the parts are {', '.join(parts)}"
                )
