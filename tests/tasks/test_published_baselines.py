"""Baselines on the public annotation files equal the figures computed from the original's formulas."""

import json
from pathlib import Path

import pytest

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.object_tracking import ObjectTracking
from vcr1_fast.tasks.overlap import interval_iou_batch
from vcr1_fast.tasks.temporal_grounding import TemporalGrounding
from vcr1_fast.types import Example

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FIXED, PAPER = TaskConfig(), TaskConfig(recipe="paper")


def load(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no annotation file {name}")
    return json.loads(path.read_text())


def grounding_rows(name):
    return [
        {"intervals": [interval], "duration_s": video["duration"], "query": query}
        for video in load(name).values()
        for interval, query in zip(video["timestamps"], video["sentences"], strict=True)
    ]


def grounding_examples(task, rows):
    """The usable rows as examples, and the reasons of the others."""
    examples, reasons = [], []
    for i, row in enumerate(rows):
        try:
            truth = task.parse_truth(row)
        except ValueError as error:
            reasons.append(str(error))
            continue
        examples.append(Example(str(i), task.name, "/v.mp4", row["query"], row["duration_s"], truth))
    return examples, reasons


def percent(metrics):
    return {name: round(100 * value, 1) for name, value in metrics.items()}


def test_charades_whole_video():
    task = TemporalGrounding(PAPER)
    examples, reasons = grounding_examples(task, grounding_rows("charades_test.json"))
    assert (len(examples), reasons) == (3720, [])
    answers = [f"<answer>0.00 to {ex.duration_s:.2f}</answer>" for ex in examples]
    assert percent(task.metrics(examples, answers)) == {"miou": 27.0, "r@0.3": 34.3, "r@0.5": 0.4, "r@0.7": 0.0}


def test_charades_best_constant():
    task = TemporalGrounding(PAPER)
    examples, _ = grounding_examples(task, grounding_rows("charades_test.json"))
    predicted = [[(0.0, 0.45 * ex.duration_s)] for ex in examples]
    iou = interval_iou_batch(predicted, [ex.truth.intervals_s for ex in examples], "hull")
    assert round(100 * sum(iou) / len(iou), 1) == 30.5
    answers = task.trivial_answers(examples)["best_constant"]
    assert answers[0].endswith(f"<answer>0.00 to {0.45 * examples[0].duration_s:.2f}</answer>")
    metrics = task.metrics(examples, answers)
    assert percent(metrics) == {"miou": 30.5, "r@0.3": 48.8, "r@0.5": 27.7, "r@0.7": 11.9}


def test_charades_train_has_four_reversed_rows_and_1789_late_ends():
    rows = grounding_rows("charades_train.json")
    late = sum(row["intervals"][0][1] > row["duration_s"] for row in rows)
    assert (len(rows), late) == (12408, 1789)
    examples, reasons = grounding_examples(TemporalGrounding(FIXED), rows)
    reversed_rows = [reason for reason in reasons if "before it starts" in reason]
    assert len(reversed_rows) == 4
    assert "interval 0 ends (12.0 s) before it starts (20.9 s)" in reversed_rows
    assert all(0.0 <= start_s < end_s <= ex.duration_s for ex in examples for start_s, end_s in ex.truth.intervals_s)
    assert len(grounding_examples(TemporalGrounding(PAPER), rows)[0]) == 12408


@pytest.mark.parametrize(("config", "headline"), [(PAPER, "mean_overlap_with_first"), (FIXED, "mean_overlap")])
def test_got_repeat_the_first_box(config, headline):
    task = ObjectTracking(config)
    examples = []
    for i, row in enumerate(load("got_val.json")):
        truth = task.parse_truth({"boxes": row["gt"], "times_s": [0.5 * k for k in range(8)]})
        examples.append(Example(str(i), task.name, row["path"], row["object"], 4.0, truth))
    assert len(examples) == 180
    metrics = task.metrics(examples, task.trivial_answers(examples)["repeat_first_box"])
    assert next(iter(metrics)) == headline
    assert round(100 * metrics["mean_overlap_with_first"], 2) == 42.35
    rounded = percent(metrics)
    assert (rounded["r@0.5_with_first"], rounded["r@0.7_with_first"]) == (32.2, 5.6)
    assert (rounded["mean_overlap"], rounded["r@0.5"]) == (34.1, 22.2)
