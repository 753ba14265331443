"""Rows without an answer: what each task asks with, and what is read in what was said."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.unlabelled import read_answer, unlabelled
from vcr1_fast.types import Example

BOX = [0.1, 0.2, 0.5, 0.6]
OPTIONS = ["(A) a cat", "(B) a dog"]


def example(task: str, row: dict[str, object], config: TaskConfig) -> Example:
    truth = unlabelled(make_tasks(config)[task], config).parse_truth(row)
    return Example("e", task, "a.mp4", "Which one?", math.inf, truth)


@pytest.mark.parametrize(
    ("task", "row", "text", "parsed"),
    [
        ("temporal_grounding", {}, "<answer>1.5 to 4</answer>", {"intervals": [[1.5, 4.0]]}),
        ("temporal_grounding", {}, "<answer>4 to 1.5</answer>", None),
        ("temporal_grounding", {}, "never", None),
        ("multiple_choice", {"options": OPTIONS}, "<answer>B</answer>", {"answer": "B", "option": "a dog"}),
        ("multiple_choice", {"options": OPTIONS}, "<answer>C</answer>", None),
        (
            "grounded_qa",
            {"options": OPTIONS},
            "<answer>A</answer><glue>[(1, 2), (3, 4.5)]</glue>",
            {"answer": "A", "option": "a cat", "intervals": [[1.0, 2.0], [3.0, 4.5]]},
        ),
        ("grounded_qa", {"options": OPTIONS}, "<glue>[(1, 2)]</glue>", {"intervals": [[1.0, 2.0]]}),
        ("numeric_answer", {}, "<answer>3.5</answer>", {"answer": 3.5}),
        ("numeric_answer", {}, "<answer>inf</answer>", None),
        ("video_quality", {}, "<answer> high </answer>", {"answer": "high"}),
        ("captioning", {}, "no block", None),
        (
            "object_tracking",
            {"box": BOX, "times_s": [0, 2]},
            "<answer>[[0,0,1,1],[0.5,0.5,1,1]]</answer>",
            {"boxes": [[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]], "times_s": [0.0, 2.0]},
        ),
        ("object_tracking", {"box": BOX, "times_s": [0, 2]}, "<answer>[[0,0,1,1]]</answer>", None),
        ("object_tracking", {"box": BOX, "times_s": [0, 2]}, "<answer>[[0,0,1,1],[0,0,1]]</answer>", None),
    ],
)
def test_what_is_read(task: str, row: dict[str, object], text: str, parsed: dict[str, Any] | None) -> None:
    config = TaskConfig()
    assert read_answer(example(task, row, config), text, config) == parsed


def test_periods_by_list_and_recipe_paper() -> None:
    listed = TaskConfig(grounding_answer="list")
    asked = example("temporal_grounding", {}, listed)
    assert read_answer(asked, "<answer>[(1, 2), (5, 6)]</answer>", listed) == {"intervals": [[1.0, 2.0], [5.0, 6.0]]}
    paper = TaskConfig(recipe="paper")
    row: dict[str, object] = {"options": ["A. a cat ", "B. a dog"]}
    asked = example("multiple_choice", row, paper)
    assert "['A. a cat ', 'B. a dog']" in make_tasks(paper)["multiple_choice"].question(asked)  # byte for byte
    assert read_answer(asked, "<answer>B</answer>", paper) == {"answer": "B", "option": "a dog"}


def test_instants_are_even_and_boxes_after_the_first_unknown() -> None:
    config = TaskConfig()
    truth: Any = example("object_tracking", {"boxes": [BOX, [0, 0, 1, 1]], "duration_s": 4}, config).truth
    assert truth.times_s == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    assert truth.boxes[0] == tuple(BOX) and len(truth.boxes) == 8
    assert all(math.isnan(corner) for box in truth.boxes[1:] for corner in box)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("multiple_choice", {}, "options is missing"),
        ("grounded_qa", {"options": ["one"]}, "options is .*, wanted a list of 2 to 26 texts"),
        ("object_tracking", {"times_s": [0, 1]}, "box is missing"),
        ("object_tracking", {"box": BOX}, "times_s and duration_s are missing"),
        ("object_tracking", {"box": [0.5, 0, 0.1, 1], "times_s": [0, 1]}, "wanted x0 < x1"),
        ("object_tracking", {"box": BOX, "times_s": [0, 9], "duration_s": 8}, "the video ends at 8.0 s"),
    ],
)
def test_what_a_question_needs(task: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example(task, row, TaskConfig())
