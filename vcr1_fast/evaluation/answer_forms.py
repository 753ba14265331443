"""Which answers the benchmark's reader found something in, and which have the form that the reward asks for.

A score alone does not tell a model that is wrong from one that is not understood. Called by `scores`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vcr1_fast.evaluation.samples import Answer
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example

Form = Callable[[Sequence[Example], Sequence[str]], Sequence[object]]  # one truth value per answer


def answer_forms(task: Task, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, list[bool]]:
    """Column "readable" and column "well_formed": whether each answer is; refused and failed ones are neither.

    See `task.Task` for who says it. A column is missing where a task of the user's does not say, or raises.
    """
    asked = [i for i, example in enumerate(examples) if not (example.is_refused or answers[i].failure)]
    columns: dict[str, list[bool]] = {}
    for name, form in (("readable", getattr(task, "are_readable", None)), ("well_formed", _well_formed(task))):
        if form is None:
            continue
        try:
            flags = form([examples[i] for i in asked], [answers[i].text for i in asked]) if asked else ()
            of = dict(zip(asked, map(bool, flags), strict=True))
        except (Exception, SystemExit) as error:  # user code
            reason = f"{type(error).__name__}: {error}"
            print(f"not known which answers are {name}: task {task.name}: {reason}", file=sys.stderr)
            continue
        columns[name] = [of.get(i, False) for i in range(len(examples))]
    return columns


def _well_formed(task: Task) -> Form | None:
    """The task's own answer, else the part "format" of its score."""
    own: Form | None = getattr(task, "are_well_formed", None)
    if own is not None or "format" not in task.part_names:
        return own
    score = getattr(task, "own_parts", task.score)  # further rewards of the user's say nothing about it
    return lambda examples, answers: score(examples, answers)["format"]
