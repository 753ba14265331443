"""recipe paper: queries, options and boxes of the public annotation files reach the prompt byte for byte.

Expected values follow VideoChat-R1: its grpo_tg.py and sft_grounding.py strip and lower-case a query and drop its last
".", its evaluate_grounding.py does not; options and start boxes are Python's text of what a file holds.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TASKS = make_tasks(TaskConfig(recipe="paper"))


def load(name: str, task: str | None = None):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no annotation file {name}")
    (content,) = read_annotation_files([AnnotationSource(path, task=task)], TASKS, "paper")
    return json.loads(path.read_text(encoding="utf-8")), content.examples


def question(example: Example) -> str:
    return TASKS[example.task].question(example)


def original_event(sentence: str) -> str:
    event = sentence.strip().lower()
    return event[:-1] if event.endswith(".") else event


@pytest.mark.parametrize(("name", "num_with_double_blanks"), [("charades_train.json", 33), ("charades_test.json", 9)])
def test_grounding_queries(name, num_with_double_blanks):
    videos, examples = load(name)
    sentences = [sentence for video in videos.values() for sentence in video["sentences"]]
    for sentence, example in zip(sentences, examples, strict=True):
        assert f'the event "{original_event(sentence)}" in' in question(example)
        assert f'the event "{sentence}" in' in question(replace(example, is_held_out=True))
    folded = [" ".join(sentence.split()) != sentence for sentence in sentences]
    assert sum(folded) == num_with_double_blanks  # that these were kept is what the loop has shown


@pytest.mark.parametrize("task", ["grounded_qa", "multiple_choice"])
def test_questions_and_options(task):
    rows, examples = load("nextgqa_val.json", task)
    num_odd = 0
    for row, example in zip(rows, examples, strict=True):
        assert f'the question "{row["question"]}". Choose one of the options {row["options"]}.' in question(example)
        num_odd += any(option != option.strip() for option in row["options"])
    assert (len(rows), num_odd) == (3358, 3)


def test_objects_and_start_boxes():
    rows, examples = load("got_val.json")
    for row, example in zip(rows, examples, strict=True):
        assert f'the object "{row["object"]}" through the video. It starts at {row["gt"][0]}:' in question(example)


def test_instructions():
    rows, examples = load("vidtab_quality_test.json")
    for row, example in zip(rows, examples, strict=True):
        assert question(example).startswith(f"{row['instruction']} Reason")
