"""A user's own tasks and reward parts, named in the settings as module:attribute and loaded when a run starts.

task.custom: ["my_task:Counting"] -> classes that fulfil task.Task. task.rewards: {"counting": ["my_task:brevity"]} ->
functions (examples, answers) -> one number in [0, 1] per answer, which become reward parts of that task. What user code
returns is checked on every call, so that a NaN is a named error and not a broken policy; what scores answers runs in a
process of its own (reward_process.py), so that it may hang or crash. Called by tasks/__init__.py and reward_worker.py.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks.reward_process import RewardError, RewardProcess
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, Truth

Reward = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]

MAX_MESSAGE = 1000  # letters of what a user's error says
TASK_METHODS = ("parse_truth", "question", "target", "score", "metrics", "trivial_answers")


def load_tasks(paths: Sequence[str], taken: Collection[str]) -> dict[str, type[Task]]:
    """Name -> class of each "module:Class". `taken` are the names of the tasks there are already.

    Raises ConfigError when one cannot be found or imported, lacks a member of task.Task, or has a name that is taken.
    """
    classes: dict[str, type[Task]] = {}
    for path in paths:
        found = _load(path, "task.custom")
        _check_class(found, path)
        if found.name in taken or found.name in classes:
            raise ConfigError(f"task.custom: {path} has the name {found.name!r}, which another task has: rename it")
        classes[found.name] = found
    return classes


def make_custom(name: str, found: type[Task], config: TaskConfig) -> Task:
    """The task itself. Raises ConfigError when its constructor does not take the settings, or raises."""
    try:
        return found(config)
    except (Exception, SystemExit) as error:  # user code runs here
        reason = f"its constructor raised {type(error).__name__}: {error}"
        raise ConfigError(f"task.custom: {name}: {reason}; it gets the section task of the settings") from error


def load_rewards(settings: Mapping[str, Sequence[str]], task_names: Collection[str]) -> dict[str, dict[str, Reward]]:
    """Task -> part name -> function, of each task -> ["module:function"]. The part is named after the function.

    Raises ConfigError when a task does not exist, or a function cannot be found or does not take two arguments.
    """
    loaded: dict[str, dict[str, Reward]] = {}
    for task_name, paths in settings.items():
        if task_name not in task_names:
            raise ConfigError(f"task.rewards.{task_name}: there is no such task{nearest(task_name, task_names)}")
        parts = loaded.setdefault(task_name, {})
        for path in paths:
            function = _load(path, f"task.rewards.{task_name}")
            part = path.rpartition(":")[2]
            if part in parts:
                raise ConfigError(f"task.rewards.{task_name} names two functions {part!r}: rename one")
            if not _is_reward(function):
                raise ConfigError(
                    f"task.rewards.{task_name}: {path} is {function!r:.60}, wanted a function of (examples, answers) "
                    "that returns one number per answer"
                )
            parts[part] = function
    return loaded


def check_tasks(
    tasks: Mapping[str, Task],
    rewards: Mapping[str, Mapping[str, Reward]],
    custom: Collection[str],
    process: RewardProcess | None = None,
) -> dict[str, Task]:
    """The same tasks, those named in `rewards` or `custom` wrapped in CheckedTask. Raises ConfigError."""
    checked = dict(tasks)
    for name, task in tasks.items():
        if name in rewards or name in custom:
            # A Task in all but its constructor, which the protocol fixes for the registry's sake.
            checked[name] = cast("Task", CheckedTask(task, rewards.get(name, {}), name in custom, process))
    return checked


class CheckedTask:
    """A task with further reward parts; what user code returns is checked, what it raises on a row is a bad row."""

    def __init__(
        self, task: Task, rewards: Mapping[str, Reward], is_custom: bool, process: RewardProcess | None = None
    ) -> None:
        """`is_custom`: the task itself is the user's, so its own score is checked, too. `process`: where rewards, and
        score and metrics of a custom task, run; None: here. Raises ConfigError."""
        self.task, self.rewards, self.is_custom = task, dict(rewards), is_custom
        self._process = process
        self.name = task.name
        if twice := sorted(set(rewards) & set(task.part_names)):
            raise ConfigError(
                f"task.rewards.{task.name}: the task has a part {twice[0]!r} already: rename the function"
            )
        self.part_names: tuple[str, ...] = (*task.part_names, *rewards)

    def __getattr__(self, name: str) -> object:
        """What is not part of task.Task, such as Captioning.judge."""
        if name == "task":  # a copy under construction has none yet
            raise AttributeError(name)
        return getattr(self.task, name)

    def parse_truth(self, row: Mapping[str, object]) -> Truth:
        """As the task does, but every error of a custom task is a ValueError: one bad row must not end the loading."""
        try:
            return self.task.parse_truth(row)
        except (Exception, SystemExit) as error:
            if not self.is_custom or isinstance(error, ValueError):
                raise
            raise ValueError(f"parse_truth of task {self.name} raised {type(error).__name__}: {error}") from error

    def question(self, example: Example) -> str:
        return self.task.question(example)

    def target(self, example: Example) -> str:
        return self.task.target(example)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """The task's parts and the further ones. Raises RewardError that names who gave what, and for which item."""
        parts = self.own_parts(examples, answers)
        return parts | {part: self._ask(f"reward {part}", examples, answers) for part in self.rewards}

    def own_parts(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """`score` without the further parts, which may cost much."""
        return self._ask("score", examples, answers) if self.is_custom else self.task.score(examples, answers)

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        return self._ask("metrics", examples, answers) if self.is_custom else self.task.metrics(examples, answers)

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        return self.task.trivial_answers(examples)

    def _ask(self, member: str, examples: Sequence[Example], answers: Sequence[str]) -> Any:
        if self._process is None:
            return self.call_here(member, examples, answers)
        return self._process.ask(self.name, member, f"{member} of task {self.name}", examples, answers)

    def call_here(self, member: str, examples: Sequence[Example], answers: Sequence[str]) -> Any:
        """What the user's code says, checked. `member`: score, metrics, or "reward NAME". Raises RewardError."""
        source = f"{member} of task {self.name}"
        reward = self.rewards.get(member.removeprefix("reward "))
        try:
            if reward is not None and member.startswith("reward "):
                return checked_values(reward(examples, answers), examples, source)
            if member == "metrics":
                return checked_metrics(self.task.metrics(examples, answers), source)
            return self._checked_parts(self.task.score(examples, answers), examples)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit in a reward must not pass for the end of a run
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}, line {last.lineno}"
            raise RewardError(f"{source} raised {type(error).__name__}: {error} ({where})"[:MAX_MESSAGE]) from error

    def _checked_parts(self, parts: object, examples: Sequence[Example]) -> dict[str, list[float]]:
        if not isinstance(parts, dict) or set(parts) != set(self.task.part_names):
            got = ", ".join(map(str, parts)) if isinstance(parts, dict) else type(parts).__name__
            wanted = f"a dict of its part_names {', '.join(self.task.part_names)}"
            raise RewardError(f"score of task {self.name} gave {got}, wanted {wanted}")
        return {
            part: checked_values(values, examples, f"part {part} of task {self.name}") for part, values in parts.items()
        }


def checked_metrics(metrics: object, source: str) -> dict[str, float]:
    """The metrics as floats. Raises RewardError unless there is at least one name, each with a finite number."""
    if not isinstance(metrics, dict) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise RewardError(f"{source} gave {metrics!r:.60}, wanted a dict of names and numbers")
    values = {name: _number(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise RewardError(f"{source} gave {metrics[name]!r:.60} for {name}, wanted a finite number")
    return values


def checked_values(values: object, examples: Sequence[Example], source: str) -> list[float]:
    """The values as floats. Raises RewardError unless there is one finite number in [0, 1] per example."""
    try:
        listed = list(values)  # type: ignore[call-overload]  # a list, a tuple, an array
    except TypeError:
        raise RewardError(f"{source} gave {values!r:.60}, wanted a list of {len(examples)} numbers") from None
    if len(listed) != len(examples):
        raise RewardError(f"{source} gave {len(listed)} values for {len(examples)} answers, wanted one per answer")
    result: list[float] = []
    for index, (value, example) in enumerate(zip(listed, examples, strict=True)):
        number = _number(value)
        if not 0.0 <= number <= 1.0:
            raise RewardError(
                f"{source} gave {value!r:.60} for answer {index} (example {example.id}), wanted a number in [0, 1]"
            )
        result.append(number)
    return result


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _load(path: str, setting: str) -> Any:
    """What "module:attribute" names; the current folder is searched last. Raises ConfigError."""
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{setting}: {path!r} is not module:name, wanted for example my_package.my_module:MyClass")
    if os.getcwd() not in sys.path:  # unlike `python -m`, the vcr1-fast command does not put it there
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        advice = "install it, or start in the folder that holds it"
        raise ConfigError(f"{setting}: {path}: there is no module {error.name!r}: {advice}") from error
    except (Exception, SystemExit) as error:  # user code runs here
        raise ConfigError(f"{setting}: {path}: importing it raised {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        near = nearest(attribute, [name for name in vars(module) if not name.startswith("_")])
        raise ConfigError(f"{setting}: {module.__file__} has no {attribute!r}{near}")
    return getattr(module, attribute)


def _check_class(found: object, path: str) -> None:
    if not inspect.isclass(found):
        raise ConfigError(f"task.custom: {path} is {found!r:.60}, wanted a class")
    missing = [name for name in TASK_METHODS if not callable(getattr(found, name, None))]
    name, parts = getattr(found, "name", None), getattr(found, "part_names", None)
    if not isinstance(name, str) or not name:
        missing.append("name (a text)")
    if not isinstance(parts, tuple) or not parts or not all(isinstance(part, str) for part in parts):
        missing.append("part_names (a tuple of texts)")
    if missing:
        raise ConfigError(f"task.custom: {path} is no task, it lacks {', '.join(missing)}: see vcr1_fast/tasks/task.py")


def _is_reward(found: Any) -> bool:
    """Whether it is a function that can be called with two arguments."""
    if inspect.isclass(found) or not callable(found):
        return False
    try:
        inspect.signature(found).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # compiled functions may hide their signature
        return True
    return True


def nearest(name: str, known: Collection[str]) -> str:
    """ ", did you mean 'x'?" for the known name that is most like this one; "" where none is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
