"""What a person is shown of an example and an answer: the truth as text, and the part of the answer that counts.

For samples, printed answers and reports; nothing is scored by it. Loads no torch.
"""

from __future__ import annotations

import contextlib

from vcr1_fast.tasks.answer_format import clip, tag_blocks
from vcr1_fast.tasks.task import Task
from vcr1_fast.types import Example, IntervalTruth, RefusedTruth, TrackTruth


def shown_question(task: Task, example: Example) -> str:
    """What was asked; the query where nothing could be."""
    if not example.is_refused:
        with contextlib.suppress(Exception, SystemExit):  # user code: the example's failure says what it raised
            return task.question(example)
    return example.query


def shown_answer(answer: str) -> str:
    """What stands in the last answer block, and below it in the last glue block; "" without an answer block."""
    text = clip(answer)
    answers, glue = tag_blocks(text, "answer"), tag_blocks(text, "glue")
    return "\n".join(block.strip() for block in (*answers[-1:], *glue[-1:])) if answers else ""


def shown_truth(task: Task, example: Example) -> str:
    """The truth in the words of an answer: the task's own `shown_truth(example)` where it has one, else its target.

    Several true periods are all named, where a target has the longest alone. "" where a task of the user's raises.
    """
    if isinstance(example.truth, RefusedTruth):
        return f"refused: {example.truth.reason}"
    own = getattr(task, "shown_truth", None)
    with contextlib.suppress(Exception, SystemExit):  # user code
        if own is not None:
            return str(own(example))
        if type(example.truth) is IntervalTruth:
            return ", ".join(f"{start_s:.2f} to {end_s:.2f}" for start_s, end_s in example.truth.intervals_s)
        target = task.target(example)
        return shown_answer(target) or target.rpartition("</think>")[2].strip()
    return ""


def shown_times_s(example: Example) -> list[float]:
    """The instants of the true boxes, seconds; [] for what has none."""
    return list(example.truth.times_s) if isinstance(example.truth, TrackTruth) else []
