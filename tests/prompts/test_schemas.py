"""The schemas: which one a file is of, what its entries become, and the public files with the published counts."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vcr1_fast.prompts.annotation_files import read_entries
from vcr1_fast.prompts.dataset import AnnotationFile, AnnotationSource, read_annotation_files
from vcr1_fast.prompts.schemas import SCHEMAS, find_schema
from vcr1_fast.prompts.schemas.got10k import FIXED_TIMES_S
from vcr1_fast.prompts.schemas.schema import Recipe, Row
from vcr1_fast.settings.config import ConfigError, DataConfig, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.overlap import box_iou
from vcr1_fast.types import ChoiceTruth, GroundedChoiceTruth, IntervalTruth, LabelTruth, TrackTruth

DATA = Path(__file__).parents[2].parent / "shared" / "data"
VIDEO = {"duration": 30.0, "timestamps": [[1, 2.5]], "sentences": [" a dog runs. "]}
QUESTION = {
    "id": "7_1",
    "video": "1104/7.mp4",
    "question": "why did the boy run",
    "options": ["(A) to win", "(B) for fun"],
    "duration": 90,
    "glue": [[13.8, 29.8], [40, 41]],
    "type": "CW",
    "answer": "(B)",
}
QUALITY = {"video": "1378.mp4", "instruction": "'low quality' or 'high quality'?", "answer": "low quality"}
TRACK = {"path": "/cluster/GOT-10k_Val_000010", "object": "sloth", "gt": [[0.1, 0.0, 0.8, 0.7]] * 8}
BENCH = {"duration": 33.75, "spans": [[0.0, 6.9], [3, 4]], "queries": [" a person  sits. ", "..it stops."]}
EVENTS = {
    "source": "cosmo_cap",
    "video_path": "a/b.mp4",
    "duration": 60.1,
    "events": [{"query": "a dog\nruns.", "span": [[1, 9], [12, 13]]}, {"query": "it stops", "span": [2, 3]}],
}
OWN = {"task": "temporal_grounding", "video": "a.mp4", "query": "q", "duration_s": 8, "intervals": [[1, 2]]}


def write(folder: Path, content: object, name: str = "set.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def read(path: Path, recipe: Recipe = "fixed", **how: str) -> AnnotationFile:
    (content,) = read_annotation_files([AnnotationSource(path, **how)], make_tasks(TaskConfig(recipe=recipe)), recipe)
    return content


def public(name: str, recipe: Recipe = "fixed", **how: str) -> AnnotationFile:
    if not (DATA / name).exists():
        pytest.skip(f"no annotation file {name}")
    return read(DATA / name, recipe, **how)


def rows_of(schema: str, entry: object, recipe: Recipe = "fixed") -> list[tuple[str, Row]]:
    assert isinstance(entry, dict)
    return list(SCHEMAS[schema].to_rows("w", entry, recipe))


def test_a_charades_entry_becomes_one_row_per_sentence():
    entry = {
        "duration": 30.0,
        "timestamps": [[1, 2.5], [4, 3]],
        "sentences": [" a dog runs. ", "it stops"],
        "phrases": [],
    }
    first: Row = {"task": "temporal_grounding", "video": "w", "duration_s": 30.0}
    assert rows_of("charades", entry) == [
        ("w:1", first | {"query": "a dog runs.", "intervals": [[1, 2.5]]}),
        ("w:2", first | {"query": "it stops", "intervals": [[4, 3]]}),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sentences": ["a", "b"]}, "there are 1 timestamps but 2 sentences, wanted one for one"),
        ({"sentences": []}, r"sentences \[\], wanted two lists, not empty"),
        ({"sentences": "abc"}, "sentences 'abc', wanted two lists"),
        ({"timestamps": None}, "timestamps is a NoneType"),
        ({"timestamps": {}}, "timestamps is a dict"),
    ],
)
def test_a_charades_entry_whose_lists_do_not_fit_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        rows_of("charades", VIDEO | change)


def test_timelens_has_a_row_for_each_query():
    common: Row = {"task": "temporal_grounding", "video": "w", "duration_s": 33.75}
    assert rows_of("timelens_bench", BENCH) == [
        ("w:1", common | {"query": "a person sits", "intervals": [[0.0, 6.9]]}),
        ("w:2", common | {"query": "it stops", "intervals": [[3, 4]]}),
    ]
    common = {"task": "temporal_grounding", "video": "a/b.mp4", "duration_s": 60.1}
    assert rows_of("timelens_100k", EVENTS) == [
        ("w:1", common | {"query": "a dog runs", "intervals": [[1, 9], [12, 13]]}),
        ("w:2", common | {"query": "it stops", "intervals": [[2, 3]]}),
    ]
    for events, reason in (([], "wanted a list of objects"), ([7], "event 1 is 7"), ([{"query": "q"}], "key 'span'")):
        with pytest.raises(ValueError, match=reason):
            rows_of("timelens_100k", EVENTS | {"events": events})


def test_a_question_of_next_gqa_serves_two_tasks():
    asked: Row = {
        "video": "1104/7.mp4",
        "query": "why did the boy run",
        "options": ["(A) to win", "(B) for fun"],
        "answer": "B",
        "duration_s": 90,
        "type": "CW",
    }
    grounded = asked | {"task": "grounded_qa", "id": "7_1", "intervals": [[13.8, 29.8], [40, 41]]}
    assert rows_of("nextgqa", QUESTION) == [("w", grounded)]
    assert rows_of("nextgqa_choice", QUESTION) == [("w", asked | {"task": "multiple_choice", "id": "7_1:choice"})]
    ((_, odd),) = rows_of("nextgqa", QUESTION | {"answer": "the second"})
    assert odd["answer"] == "the second"  # the task refuses it
    with pytest.raises(ValueError, match="key 'question' is missing; the row has id, video"):
        rows_of("nextgqa", {key: value for key, value in QUESTION.items() if key != "question"})


def test_a_quality_question():
    want: Row = {"task": "video_quality", "video": "1378.mp4", "answer": "low quality"}
    assert rows_of("vidtab", QUALITY) == [("w", want | {"query": "'low quality' or 'high quality'?"})]


def test_boxes_of_got_get_instants():
    ((_, fixed),), ((_, paper),) = rows_of("got10k", TRACK), rows_of("got10k", TRACK, "paper")
    assert fixed["times_s"] == [0.0, 0.07, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]  # boxes 1..7 on the 7 images at 2 fps
    assert fixed["duration_s"] == 3.5
    assert paper["times_s"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]  # box i on image i of 8
    assert paper["duration_s"] == 4.0
    assert (fixed["query"], fixed["boxes"]) == ("sloth", TRACK["gt"])
    assert fixed["video"] == paper["video"] == f"{TRACK['path']}#images=7&fps=2"


@pytest.mark.parametrize(
    ("content", "schema"),
    [
        ({"AO8RW": VIDEO}, "charades"),
        ({"v_1": VIDEO | {"phrases": [["a"]]}}, "charades"),
        ({"AO8RW": BENCH}, "timelens_bench"),
        ([EVENTS], "timelens_100k"),
        ([TRACK], "got10k"),
        ([QUESTION], "nextgqa"),
        ([{key: value for key, value in QUESTION.items() if key != "glue"}], "nextgqa_choice"),
        ([QUALITY], "vidtab"),
        ([OWN], "rows"),
        ([QUALITY | OWN], "rows"),  # a row that names its task is ours, whatever else it holds
        ([3, "x", {}, QUALITY], "vidtab"),  # the first rows may be broken
        (OWN, "rows"),  # a single row of JSONL
    ],
)
def test_the_schema_is_seen_from_the_content(tmp_path: Path, content, schema):
    file = write(tmp_path, content)
    assert find_schema(file, read_entries(file)).name == schema
    assert read(file).summary.schema == schema


def test_an_unknown_schema_is_answered_with_the_keys_and_the_known_ones(tmp_path: Path):
    with pytest.raises(ConfigError) as info:
        read(write(tmp_path, [{"clip": "a.mp4", "caption": "x"}, {"clip": "b.mp4", "score": 1}]))
    message = str(info.value)
    assert "holds rows with the keys clip, caption, score, which is no known schema" in message
    for name, schema in SCHEMAS.items():
        assert f"{name} (" in message and ", ".join(schema.keys) in message
    with pytest.raises(ConfigError, match="holds a JSON object of objects with the keys a, which is no known"):
        read(write(tmp_path, {"x": {"a": 1}}))
    with pytest.raises(ConfigError, match="holds rows with the keys data, which"):
        read(write(tmp_path, {"data": [OWN]}))
    with pytest.raises(ConfigError, match="holds no object, which"):
        read(write(tmp_path, ["a", 3]))


def test_a_schema_can_be_forced(tmp_path: Path):
    file = write(tmp_path, [QUESTION])
    assert [ex.task for ex in read(file, schema="nextgqa_choice").examples] == ["multiple_choice"]
    assert [ex.task for ex in read(file, task="multiple_choice").examples] == ["multiple_choice"]
    content = read(write(tmp_path, [QUALITY], "quality.json"), schema="nextgqa")
    assert "key 'question' is missing; the row has video, instruction, answer" in content.errors[0].reason
    with pytest.raises(ConfigError, match=r"holds rows with the keys id, .*but data\.format is charades"):
        read(file, schema="charades")
    with pytest.raises(ConfigError, match="schema nextgqa, which is for the task grounded_qa, not for video_quality"):
        read(file, task="video_quality")


def test_every_schema_can_be_named_in_the_settings():
    assert get_args(get_type_hints(DataConfig)["format"]) == ("auto", *SCHEMAS)


def test_one_file_may_serve_two_tasks(tmp_path: Path):
    file = write(tmp_path, [QUESTION])
    sources = [AnnotationSource(file), AnnotationSource(file, task="multiple_choice")]
    grounded, choice = read_annotation_files(sources, make_tasks(TaskConfig()))
    assert grounded.examples[0].truth == GroundedChoiceTruth("B", ("to win", "for fun"), ((13.8, 29.8), (40.0, 41.0)))
    assert choice.examples[0].truth == ChoiceTruth("B", ("to win", "for fun"))
    assert [content.examples[0].id for content in (grounded, choice)] == ["7_1", "7_1:choice"]


# Counts below are those of the reference on the original's files, not what the loader gave.


@pytest.mark.parametrize(
    ("name", "num_videos", "num_queries", "num_late", "num_reversed"),
    [("charades_train.json", 5338, 12408, 1789, 4), ("charades_test.json", 1334, 3720, 562, 0)],
)
def test_charades_counts(name, num_videos, num_queries, num_late, num_reversed):
    paper, fixed = public(name, "paper"), public(name)
    assert (len(paper.examples), paper.errors) == (num_queries, [])
    assert len({ex.video for ex in paper.examples}) == num_videos
    assert paper.summary.defects.get("ending after the video", 0) == num_late
    assert paper.summary.defects.get("reversed", 0) == num_reversed
    assert paper.summary.refused == {}
    assert fixed.summary.refused == ({"reversed": num_reversed} if num_reversed else {})
    assert (len(fixed.examples), len(fixed.errors)) == (num_queries - num_reversed, num_reversed)
    for ex in fixed.examples:
        assert isinstance(ex.truth, IntervalTruth)
        ((start_s, end_s),) = ex.truth.intervals_s
        assert 0 <= start_s < end_s <= ex.duration_s


def test_charades_train_names_its_reversed_rows_and_repairs_the_rest():
    content = public("charades_train.json")
    sources = [error.source.removeprefix(f"{DATA}/") for error in content.errors]
    assert sources == [f"charades_train.json:{row}" for row in ("LEOL6:1", "IOL8Q:1", "AKKWU:1", "AKKWU:2")]
    assert content.errors[0].reason == "interval 0 ends (7.0 s) before it starts (8.0 s)"
    # of the 1,789 late ends those of LEOL6 (7 > 6.27 s) and AKKWU (13 > 12.27 s, twice) stand in refused rows
    assert content.summary.defects == {"ending after the video": 1786}
    assert str(content.summary) == (
        "charades_train.json (schema charades): 12,408 rows, 12,404 examples; repaired: 1,786 ending after the video; "
        "refused: 4 reversed"
    )
    durations_s = [ex.duration_s for ex in {ex.video: ex for ex in content.examples}.values()]
    assert (min(durations_s), round(statistics.median(durations_s), 1), round(max(durations_s), 1)) == (
        5.53,
        30.7,
        194.4,
    )
    first = content.examples[0]
    assert (first.id, first.query) == ("charades_train:AO8RW:1", "a person is putting a book on a shelf.")
    assert (first.duration_s, first.truth) == (33.75, IntervalTruth(((0.0, 6.9),)))
    assert first.video == str(DATA / "AO8RW.mp4")


@pytest.mark.parametrize("task", ["grounded_qa", "multiple_choice"])
def test_next_gqa_counts(task):
    name = "nextgqa_val.json"
    content = public(name, task=task)
    assert (len(content.examples), content.errors) == (3358, [])
    assert len({ex.video for ex in content.examples}) == 567
    schema = SCHEMAS[content.summary.schema]
    rows = [row for w, entry in read_entries(DATA / name).items for _, row in schema.to_rows(w, entry, "fixed")]  # type: ignore[arg-type]
    assert Counter(row["type"] for row in rows) == {"CW": 1474, "TN": 879, "CH": 481, "TC": 472, "TP": 52}
    first = content.examples[0]
    assert isinstance(first.truth, ChoiceTruth)
    assert (first.truth.letter, first.duration_s) == ("C", 90.0)
    assert first.video == str(DATA / "1104/4882821564.mp4")
    if isinstance(first.truth, GroundedChoiceTruth):
        assert (first.id, first.truth.intervals_s) == ("4882821564_1", ((13.8, 29.8),))


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
def test_got_counts(recipe: Recipe):
    content = public("got_val.json", recipe)
    assert (len(content.examples), content.errors) == (180, [])
    first = content.examples[0]
    assert isinstance(first.truth, TrackTruth)
    assert (first.query, first.truth.boxes[0]) == ("sloth", (0.093, 0.0, 0.8, 0.797))
    assert first.video.startswith("/mnt/") and first.video.endswith("/GOT-10k_Val_000010#images=7&fps=2")


def test_the_boxes_of_got_lie_where_their_instants_say():
    tracks = [ex.truth.boxes for ex in public("got_val.json").examples if isinstance(ex.truth, TrackTruth)]

    def moved(a, b):
        return (((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2) ** 0.5

    steps = [statistics.mean(moved(t[i], t[i + 1]) for t in tracks) for i in range(7)]
    assert steps == pytest.approx([0.0145, 0.0997, 0.093, 0.0885, 0.0938, 0.104, 0.106], abs=5e-4)
    assert statistics.mean(box_iou(t[0], t[1]) for t in tracks) == pytest.approx(0.838, abs=5e-4)
    gaps_s = [later - earlier for earlier, later in pairwise(FIXED_TIMES_S)]
    # the same speed all along: 0.0145 in 0.07 s, on average 0.0975 in 0.5 s
    assert steps[0] / gaps_s[0] == pytest.approx(statistics.mean(steps[1:]) / 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("name", "num_high", "num_low"),
    [("vidtab_quality_100shot.json", 100, 100), ("vidtab_quality_test.json", 364, 360)],
)
def test_quality_counts(name, num_high, num_low):
    content = public(name)
    assert content.errors == []
    labels = [ex.truth.label for ex in content.examples if isinstance(ex.truth, LabelTruth)]
    assert Counter(labels) == {"high quality": num_high, "low quality": num_low}
    assert len({ex.video for ex in content.examples}) == num_high + num_low


def test_every_public_file_is_tested():
    if not DATA.is_dir():
        pytest.skip("no annotation files")
    assert {path.name for path in DATA.glob("*.json")} == {
        "charades_train.json",
        "charades_test.json",
        "nextgqa_val.json",
        "got_val.json",
        "vidtab_quality_100shot.json",
        "vidtab_quality_test.json",
    }


SAMPLES = ([OWN], {"v": VIDEO}, [TRACK], [QUESTION], [QUALITY])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_content_of_a_field_raises_anything_but_a_named_error(tmp_path: Path, data: st.DataObject):
    sample = data.draw(st.sampled_from(SAMPLES))
    recipe: Recipe = data.draw(st.sampled_from(["fixed", "paper"]))
    entry = dict(sample["v"] if isinstance(sample, dict) else sample[0])
    key = data.draw(st.sampled_from(sorted(entry)))
    broken = entry | {key: data.draw(JUNK)}
    whole = {"v": entry, "w": broken} if isinstance(sample, dict) else [entry, broken]
    content = read(write(tmp_path, whole), recipe)
    assert len(content.examples) + len(content.errors) == content.summary.num_rows
    assert sum(content.summary.refused.values()) == len(content.errors)
    assert len(content.examples) >= 1  # the good entry
    assert all(error.source.startswith(f"{tmp_path / 'set.json'}:") for error in content.errors)
