"""Annotation rows, good and bad, and the data order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vcr1_fast.config import ConfigError
from vcr1_fast.prompts.dataset import DataOrder, load_annotations, shard
from vcr1_fast.types import IntervalTruth

GOOD = {"task": "grounding", "video": "a.mp4", "query": "a dog runs", "duration_s": 8, "interval_s": [1.0, 2.5]}


class Grounding:
    def parse_truth(self, row: Mapping[str, Any]) -> IntervalTruth:
        start_s, end_s = row["interval_s"]
        if start_s >= end_s:
            raise ValueError(f"interval_s is [{start_s}, {end_s}], wanted start < end")
        return IntervalTruth(((start_s, end_s),))


TASKS: Any = {"grounding": Grounding(), "tracking": Grounding()}


def write(folder: Path, text: str, name: str = "train.json") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": 7, "video": "/abs/b.mp4", "reasoning": "at 1 s it starts"}]
    (first, second), errors = load_annotations(write(tmp_path, json.dumps(rows)), TASKS)
    assert errors == []
    assert (first.id, first.task, first.query, first.duration_s) == ("train:1", "grounding", "a dog runs", 8.0)
    assert first.video == str(tmp_path / "a.mp4") and first.truth == IntervalTruth(((1.0, 2.5),))
    assert first.reasoning == "" and isinstance(first.duration_s, float)
    assert (second.id, second.video, second.reasoning) == ("7", "/abs/b.mp4", "at 1 s it starts")


def test_jsonl_counts_lines_and_skips_blank_ones(tmp_path: Path) -> None:
    text = "\n" + json.dumps(GOOD) + "\r\n\n" + json.dumps({**GOOD, "query": "line\u2028separator"}) + "\n{broken\n"
    file = write(tmp_path, text, "train.jsonl")
    examples, errors = load_annotations(file, TASKS, str(tmp_path / "videos"))
    assert [e.id for e in examples] == ["train:2", "train:4"]
    assert examples[0].video == str(tmp_path / "videos" / "a.mp4")
    assert [e.source for e in errors] == [f"{file}:5"] and "not valid JSON" in errors[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({k: v for k, v in GOOD.items() if k != "query"}, "key 'query' is missing; the row has task, video"),
        ({**GOOD, "query": 3}, "query is 3, wanted text"),
        ({**GOOD, "video": " "}, "video is ' ', wanted text that is not empty"),
        ({**GOOD, "duration_s": "8"}, "duration_s is '8', wanted a number"),
        ({**GOOD, "duration_s": True}, "duration_s is True, wanted a number"),
        ({**GOOD, "duration_s": 0}, "duration_s is 0, wanted a finite number of seconds > 0"),
        ({**GOOD, "duration_s": float("nan")}, "duration_s is nan, wanted a finite"),
        ({**GOOD, "duration_s": float("inf")}, "duration_s is inf, wanted a finite"),
        ({**GOOD, "duration_s": 10**400}, "wanted a finite number"),
        ({**GOOD, "task": "groundin"}, "did you mean 'grounding'?"),
        ({**GOOD, "task": "trakcing"}, "did you mean 'tracking'?"),
        ({**GOOD, "interval_s": [2, 1]}, "interval_s is [2, 1], wanted start < end"),
        ({**GOOD, "id": ["x"]}, "id is ['x'], wanted text"),
        ({**GOOD, "id": "x"}, "id 'x' is already taken by row 1"),
        ({**GOOD, "reasoning": None}, "reasoning is None, wanted text"),
        ("a row", "the row is a str, wanted an object"),
    ],
)
def test_a_bad_row_is_one_error_and_the_others_stay(tmp_path: Path, row: object, reason: str) -> None:
    file = write(tmp_path, json.dumps([{**GOOD, "id": "x"}, row, {**GOOD, "id": "y"}]))
    examples, errors = load_annotations(file, TASKS)
    assert [e.id for e in examples] == ["x", "y"]
    assert [e.source for e in errors] == [f"{file}:2"]
    assert reason in errors[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no row"),
        ("[]", "holds no row"),
        ("[{", "starts like a JSON list but is not valid JSON"),
        ("hello\nworld", "neither a JSON list nor JSONL; line 1"),
    ],
)
def test_a_file_of_no_use_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_annotations(write(tmp_path, text), TASKS)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        load_annotations(tmp_path / "none.json", TASKS)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_annotations(tmp_path, TASKS)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_item_comes_exactly_once_an_epoch_on_any_number_of_ranks(world_size: int) -> None:
    num_items, per_step = 10, 6  # steps cross the epochs' borders
    order = DataOrder(num_items, seed=3)
    seen: list[int] = []
    for step in range(5):  # 30 items: three epochs
        batch = order.indices(step * per_step, per_step)
        shares = [shard(batch, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {per_step // world_size}
        seen += [i for share in shares for i in share]
    for epoch in range(3):
        assert sorted(seen[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_the_order_is_a_function_of_seed_and_position() -> None:
    whole = DataOrder(7, seed=1).indices(0, 50)
    for start, count in [(0, 3), (5, 4), (6, 1), (7, 20), (33, 17), (12, 0)]:
        assert DataOrder(7, seed=1).indices(start, count) == whole[start : start + count]
    assert DataOrder(7, seed=2).indices(0, 50) != whole
    assert DataOrder(7, seed=-1).indices(0, 7) != DataOrder(7, seed=1).indices(0, 7)
    assert [DataOrder(7, seed=1).epoch_of(p) for p in (0, 6, 7, 20, 21)] == [0, 0, 1, 2, 3]


def test_the_order_never_changes_between_versions() -> None:
    # Frozen: a run resumed on another machine must go on in the same order.
    assert DataOrder(8, seed=0).indices(0, 8) == [0, 3, 7, 5, 1, 2, 6, 4]


def test_order_and_shares_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="num_items is 0"):
        DataOrder(0, seed=0)
    with pytest.raises(ValueError, match="start is -1"):
        DataOrder(3, seed=0).indices(-1, 2)
    with pytest.raises(ValueError, match="7 items do not divide by 2 ranks"):
        shard(range(7), 0, 2)
    with pytest.raises(ValueError, match="rank is 2"):
        shard(range(4), 2, 2)
