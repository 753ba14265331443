"""Annotation rows, good and bad, and the data order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vcr1_fast.prompts.dataset import AnnotationSource, DataOrder, read_annotation_files, shard
from vcr1_fast.prompts.interval_defects import find_interval_defects
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import Example, IntervalTruth, RefusedTruth, SampleError

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


def load_annotations(path: Path, tasks: Any, video_root: str | None = None) -> tuple[list[Example], list[SampleError]]:
    (content,) = read_annotation_files([AnnotationSource(path, video_root)], tasks)
    return content.examples, content.errors


def test_a_row_becomes_an_example(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": 7, "video": "/abs/b.mp4", "reasoning": "at 1 s it starts"}]
    (first, second), errors = load_annotations(write(tmp_path, json.dumps(rows)), TASKS)
    assert errors == []
    assert (first.id, first.task, first.query, first.duration_s) == ("train:1", "grounding", "a dog runs", 8.0)
    assert first.video == str(tmp_path / "a.mp4") and first.truth == IntervalTruth(((1.0, 2.5),))
    assert first.reasoning == "" and isinstance(first.duration_s, float)
    assert (second.id, second.video, second.reasoning) == ("7", "/abs/b.mp4", "at 1 s it starts")
    lines = write(tmp_path, json.dumps(GOOD) + "\n{broken\n", "train.jsonl")
    (elsewhere,), (error,) = load_annotations(lines, TASKS, str(tmp_path / "videos"))
    assert elsewhere.video == str(tmp_path / "videos" / "a.mp4")
    assert error.source == f"{lines}:2" and "not valid JSON" in error.reason
    with pytest.raises(ConfigError, match="holds no row"):
        load_annotations(write(tmp_path, "[]"), TASKS)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({k: v for k, v in GOOD.items() if k != "query"}, "key 'query' is missing; the row has task, video"),
        ({**GOOD, "query": 3}, "query is 3, wanted text"),
        ({**GOOD, "video": " "}, "video is ' ', wanted text that is not empty"),
        ({**GOOD, "duration_s": True}, "duration_s is True, wanted a number"),
        ({**GOOD, "duration_s": 0}, "duration_s is 0, wanted a finite number of seconds > 0"),
        ({**GOOD, "duration_s": float("inf")}, "duration_s is inf, wanted a finite"),
        ({**GOOD, "duration_s": 10**400}, "wanted a finite number"),
        ({**GOOD, "task": "trakcing"}, "did you mean 'tracking'?"),
        ({**GOOD, "interval_s": [2, 1]}, "interval_s is [2, 1], wanted start < end"),
        ({**GOOD, "id": ["x"]}, "id is ['x'], wanted text"),
        ({**GOOD, "id": "x"}, "id 'x' is already taken by row 1"),
        ({k: v for k, v in GOOD.items() if k != "duration_s"}, "key 'duration_s' is missing, wanted the seconds"),
        ({**GOOD, "reasoning": None}, "reasoning is None, wanted text"),
        ("a row", "the row is a str, wanted an object"),
        ({**GOOD, "query": "a dog \ud83d"}, r"query holds half of a character, U+D83D behind 'a dog ': write it anew"),
        ({**GOOD, "video": "\udc00.mp4"}, "video holds half of a character, U+DC00 behind ''"),
        ({**GOOD, "options": ["a", {"b": ["\ud800"]}]}, "options holds half of a character, U+D800"),
        ({**GOOD, "categories": {"kind\ud83d": "x"}}, "categories holds half of a character, U+D83D behind 'kind'"),
        ({**GOOD, "\ud83d": 1}, r"\ud83d holds half of a character"),
        ({**GOOD, "video": "https://host/a.mp4"}, "wanted a file on this machine"),
    ],
)
def test_a_bad_row_is_one_error_and_the_others_stay(tmp_path: Path, row: object, reason: str) -> None:
    file = write(tmp_path, json.dumps([{**GOOD, "id": "x"}, row, {**GOOD, "id": "y"}]))
    examples, errors = load_annotations(file, TASKS)
    assert [e.id for e in examples] == ["x", "y"]
    assert [e.source for e in errors] == [f"{file}:2"]
    assert reason in errors[0].reason
    str(errors[0]).encode()


def test_what_utf8_cannot_hold_never_reaches_a_file(tmp_path: Path) -> None:
    """Refused rows count in the scores and stand in samples.jsonl; ids and places come from keys."""
    entry = {"duration": 4, "timestamps": [[0, 1], [1, 2]], "sentences": ["a dog \ud83d", "a cat"]}
    file = write(tmp_path, json.dumps({"v": entry, "w\ud83d": entry}))
    (content,) = read_annotation_files([AnnotationSource(file)], make_tasks(TaskConfig()))
    assert [row.id for row in content.examples] == ["train:v:2"]
    assert [error.source for error in content.errors] == [
        f"{file}:{row}" for row in ("v:1", r"w\ud83d:1", r"w\ud83d:2")
    ]
    assert [row.query for row in content.rows] == [r"a dog \ud83d", "a cat", r"a dog \ud83d", "a cat"]
    for row in content.rows:
        f"{row.id} {row.video} {row.query} {row.categories} {row.truth}".encode()


def test_videos_that_cannot_be_told_apart_are_bad_rows(tmp_path: Path) -> None:
    for name in ("flat/1.mp4", "a/2.mp4", "b/2.mp4", "b/3.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    videos = ("/x/a/1.mp4", "/x/b/1.mp4", "/x/2.mp4", "/x/b/2.mp4", "/x/3.mp4")
    file = write(tmp_path, json.dumps([{**GOOD, "video": video} for video in videos]))
    (content,) = read_annotation_files([AnnotationSource(file)], TASKS)
    assert [row.video for row in content.examples] == [str(tmp_path / name) for name in ("b/2.mp4", "b/3.mp4")]
    assert [error.source for error in content.errors] == [f"{file}:{row}" for row in (1, 2, 3)]
    assert f"2 others may be meant: {tmp_path}/a/2.mp4, {tmp_path}/b/2.mp4" in content.errors[2].reason
    found = f"2 videos found by the end of their path, such as {tmp_path}/b/2.mp4 for /x/b/2.mp4"
    assert str(content.summary) == (f"train.json (schema rows): 5 rows, 2 examples; refused: 3 invalid; {found}")
    again = write(tmp_path, json.dumps([{**GOOD, "video": "/x/a/1.mp4"}]), "other.json")  # another file's names
    for content in read_annotation_files([AnnotationSource(file), AnnotationSource(again)], TASKS):
        assert len(content.examples) == (2 if content.summary.file == "train.json" else 1)


def read(*files: Path, recipe: Any = "fixed") -> Any:
    return read_annotation_files([AnnotationSource(f) for f in files], make_tasks(TaskConfig(recipe=recipe)), recipe)


def grounding(*intervals: list[Any], **extra: object) -> dict[str, object]:
    return {"task": "temporal_grounding", "video": "a", "query": "q", "duration_s": 10, "intervals": intervals, **extra}


def test_ids_differ_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first = write(tmp_path, json.dumps([grounding([1, 2], id="x"), grounding([1, 2])]))
    second = write(tmp_path / "more", json.dumps([grounding([1, 2]), grounding([3, 4], id="x"), grounding([1, 2])]))
    one, two = read(first, second)
    # two files with one stem: their rows without an id get the whole path
    assert [e.id for e in one.examples] == ["x", f"{first}:2"]
    assert [e.id for e in two.examples] == [f"{second}:1", f"{second}:3"]
    assert [(e.source, e.reason) for e in two.errors] == [
        (f"{second}:2", f"id 'x' is already taken by {first}:1: ids must differ")
    ]
    assert two.summary.refused == {"with the id of another": 1}
    with pytest.raises(ConfigError, match=r"train\.json is named 2 times: name it once"):
        read(first, first.parent / "more" / ".." / first.name)


def test_a_summary_counts_what_was_found_repaired_kept_and_refused(tmp_path: Path) -> None:
    rows = [
        grounding([1, 2]),
        grounding([1, 12], [3, 4], [5, 11]),  # two ends after the 10 s
        grounding([12, 11]),  # reversed, and both its start and its end are late
        grounding([3, 3]),
        grounding([12, 13], [2, 1]),
        grounding([-1, 1]),
        grounding([1, "x"], [2, 14]),
        "nothing",
    ]
    file = write(tmp_path, json.dumps(rows))
    (fixed,), (paper,) = read(file), read(file, recipe="paper")
    rest = {"reversed": 2, "starting after the video": 2, "of no length": 1, "starting before 0 s": 1}
    assert fixed.summary.defects == {"ending after the video": 2}
    assert fixed.summary.refused == {"reversed": 2, "of no length": 1, "starting before 0 s": 1, "invalid": 2}
    assert (fixed.summary.num_rows, fixed.summary.num_examples, len(fixed.errors)) == (8, 2, 6)
    assert fixed.examples[1].truth == IntervalTruth(((1.0, 10.0), (3.0, 4.0), (5.0, 10.0)))
    assert str(fixed.summary) == (
        "train.json (schema rows): 8 rows, 2 examples; repaired: 2 ending after the video; "
        "refused: 2 reversed, 1 of no length, 1 starting before 0 s, 2 invalid"
    )
    assert paper.summary.defects == {"ending after the video": 4, **rest}
    assert str(paper.summary) == (
        "train.json (schema rows): 8 rows, 6 examples; kept as they are: 4 ending after the video, 2 reversed, "
        "2 starting after the video, 1 of no length, 1 starting before 0 s; refused: 2 invalid"
    )


def test_refused_rows_keep_their_place_but_not_their_id(tmp_path: Path) -> None:
    rows = [
        grounding([2, 1], id="x", query="when?", categories={"kind": "OCR"}),
        grounding([1, 2], id="x"),  # the id is free: the first row did not become an example
        {"task": "no such task", "video": "a", "query": "q"},
        {"task": "temporal_grounding"},
        grounding([1, 2], id="x"),
        "nothing",
    ]
    (content,) = read(write(tmp_path, json.dumps(rows)))
    assert [(row.id, row.is_refused) for row in content.rows] == [
        ("train:1", True), ("x", False), ("train:4", True), ("train:5", True),
    ]  # fmt: skip
    first = content.rows[0]
    assert first.truth == RefusedTruth("interval 0 ends (1.0 s) before it starts (2.0 s)")
    assert (first.task, first.video, first.query) == ("temporal_grounding", str(tmp_path / "a.mp4"), "when?")
    assert first.categories == (("kind", "OCR"),)
    assert content.rows[2].video == "" and "key 'video' is missing" in content.errors[2].reason
    assert (len(content.errors), content.summary.num_rows, len(content.examples)) == (5, 6, 1)


CHOICE = {"task": "multiple_choice", "query": "which?", "options": ["a", "b"], "answer": "A"}


@pytest.mark.parametrize(
    ("row", "video", "media"),
    [
        ({"video": "a.mp4"}, "a.mp4", ()),  # as ever
        ({"videos": ["a.mp4"]}, "a.mp4", ()),
        ({"videos": ["a.mp4", "b.mkv"]}, "a.mp4", ("a.mp4", "b.mkv")),
        ({"image": "i.png"}, "", ("i.png#image",)),
        ({"task": "numeric_answer", "answer": 4, "image": "i.png"}, "", ("i.png#image",)),
        ({"images": ["i.PNG", "j.jpg"], "video": "a.mp4"}, "a.mp4", ("i.PNG#image", "j.jpg#image", "a.mp4")),
        ({"video": "i.png"}, "i.png", ()),  # the key says what it is: a video of one frame
        ({"video": None, "image": None}, "", ()),
        ({}, "", ()),
    ],
)
def test_what_a_row_shows(tmp_path: Path, row: dict[str, Any], video: str, media: tuple[str, ...]) -> None:
    for name in ("a.mp4", "b.mkv", "i.PNG", "j.jpg", "i.png"):
        (tmp_path / name).touch()
    (content,) = read(write(tmp_path, json.dumps([{**CHOICE, **row}])))
    assert content.errors == []
    [example] = content.examples
    at = f"{tmp_path}/"
    assert (example.video, example.media) == (video and at + video, tuple(at + name for name in media))
    assert example.sources == (example.media or ((at + video,) if video else ()))
    assert ("1 show neither video nor image" in str(content.summary)) == (not example.sources)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**CHOICE, "video": ""}, "video is '', wanted text that is not empty"),
        ({**CHOICE, "images": ["i.png", 3]}, r"images is \['i.png', 3\], wanted a list of texts"),
        ({**CHOICE, "image": "i.png", "images": []}, "the row has both 'image' and 'images'"),
        ({**CHOICE, "videos": ["a.mp4"] * 65}, "videos holds 65 names, wanted at most 64"),
        (grounding([1, 2]) | {"video": None, "image": "i.png"}, "video is None, wanted text"),
        (grounding([1, 2]) | {"video": None, "videos": ["a", "b"]}, "names 2 videos, wanted one: the task temporal_g"),
    ],
)
def test_what_a_row_cannot_show(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (content,) = read(write(tmp_path, json.dumps([row])))
    assert content.examples == []
    with pytest.raises(SampleError, match=reason):
        raise content.errors[0]


def test_a_refused_entry_of_a_schema_has_the_task_of_the_schema(tmp_path: Path) -> None:
    good = {"duration": 30.0, "timestamps": [[1, 2.5]], "sentences": ["a dog runs"]}
    (content,) = read(write(tmp_path, json.dumps({"v_1": good, "v_2": good | {"sentences": []}})))
    assert [(row.id, row.task) for row in content.rows if row.is_refused] == [("train:v_2", "temporal_grounding")]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({}, ()),
        ({"type": "CW"}, (("type", "CW"),)),
        ({"type": 3}, ()),
        ({"type": "CW", "categories": {"area": "physics"}}, (("area", "physics"),)),
        (
            {"categories": {"tag": ["motion", "camera", "motion"], "level": 2, "none": None, "deep": [{}]}},
            (("tag", "motion"), ("tag", "camera"), ("level", "2")),
        ),
        ({"categories": ["physics"]}, ()),
    ],
)
def test_categories_are_pairs_of_axis_and_value(tmp_path: Path, row: Any, wanted: Any) -> None:
    (content,) = read(write(tmp_path, json.dumps([grounding([1, 2], **row)])))
    assert content.examples[0].categories == wanted


def test_a_source_for_an_unknown_or_another_task(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps([{"video": "a", "instruction": "good?", "answer": "good"}]))
    tasks = make_tasks(TaskConfig())
    with pytest.raises(
        ConfigError, match=r"is for the task 'video_qualty', wanted one of .*did you mean 'video_quality'"
    ):
        read_annotation_files([AnnotationSource(file, task="video_qualty")], tasks)
    with pytest.raises(
        ConfigError, match="to be read as vidtab, which is for the task video_quality, not for captioning"
    ):
        read_annotation_files([AnnotationSource(file, schema="vidtab", task="captioning")], tasks)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"intervals": "x"},
        {"intervals": [[1], [1, 2, 3], 5, ["2", 1], [True, 0], [float("nan"), 1]]},  # the task names these
        {"intervals": [[1, 20]]},  # no duration to be late for
        {"intervals": [[1, 20]], "duration_s": "10"},
        {"intervals": [[1, 20]], "duration_s": -5},
        {"intervals": [[0, 10]], "duration_s": 10},
    ],
)
def test_rows_without_a_known_defect(row: dict[str, object]) -> None:
    assert not find_interval_defects(row)


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
    """See test_mixture.py for positions."""
    assert DataOrder(7, seed=2).indices(0, 50) != DataOrder(7, seed=1).indices(0, 50)
    assert DataOrder(7, seed=-1).indices(0, 7) != DataOrder(7, seed=1).indices(0, 7)


def test_the_order_never_changes_between_versions() -> None:
    # Frozen: a run resumed on another machine must go on in the same order.
    assert DataOrder(8, seed=0).indices(0, 8) == [0, 3, 7, 5, 1, 2, 6, 4]
