"""Benchmarks as they are published -> rows that the task multiple_choice takes, with categories."""

import json
from pathlib import Path

import pytest

import vcr1_fast.cli as cli
from vcr1_fast.evaluation.suites import MVBENCH_FOLDERS, read_suite
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import ChoiceTruth

VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which decoration is there most often?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All alike."],
    "answer": "C",
}
MVBENCH = {
    "video": "ZS9XR.mp4",
    "question": "What happened after the person took the food?",
    "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup/glass/bottle.", "Took the box."],
    "answer": "Put down the cup/glass/bottle.",
    "start": 11.1,
    "end": 19.6,
}
PERCEPTION = {
    "id": 34,
    "question": "Is the camera moving?",
    "options": ["No", "I don't know", "Yes"],
    "answer_id": 2,
    "area": "physics",
    "reasoning": "descriptive",
    "tag": ["motion", "camera"],
}


def write(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


def as_parquet(file: Path, rows: list[dict[str, object]]) -> Path:
    datasets = pytest.importorskip("datasets", reason="parquet is read through `datasets`")
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    return file


def test_videomme(tmp_path: Path):
    second = VIDEOMME | {"question_id": "601-1", "videoID": "xyz", "duration": "long", "answer": "A"}
    (tmp_path / "xyz.mkv").touch()
    found = read_suite("videomme", [write(tmp_path / "test.json", [VIDEOMME, second])])
    assert found.errors == []
    assert [row["id"] for row in found.rows] == ["videomme:001-1", "videomme:601-1"]
    assert [row["video"] for row in found.rows] == [str(tmp_path / "fFjv93ACGo8.mp4"), str(tmp_path / "xyz.mkv")]
    assert found.rows[0]["categories"] == {
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "task_type": "Counting Problem",
    }
    short = read_suite("videomme", [tmp_path / "test.json"], only={"duration": "short"})
    assert [row["id"] for row in short.rows] == ["videomme:001-1"]
    with pytest.raises(ConfigError, match="no question has duration=tiny; duration is one of: long, short"):
        read_suite("videomme", [tmp_path / "test.json"], only={"duration": "tiny"})


def test_videomme_with_a_list_of_questions_per_video(tmp_path: Path):
    """The layout of the benchmark's own output template, in which nothing but the number names some videos."""
    of_question = ("question_id", "task_type", "question", "options", "answer")
    video = {key: value for key, value in VIDEOMME.items() if key not in of_question}
    question = {key: VIDEOMME[key] for key in of_question}
    second = question | {"question_id": "001-2", "answer": "A", "response": "B"}
    plain = {key: value for key, value in video.items() if key not in ("url", "videoID")} | {"video_id": "002"}
    by_url = {key: value for key, value in video.items() if key != "videoID"}
    content = [
        video | {"questions": [question, second, 7]},
        plain | {"questions": [question | {"question_id": "002-1"}]},
        by_url | {"questions": [question | {"question_id": "003-1"}]},
        by_url | {"questions": []},
    ]
    found = read_suite("videomme", [write(tmp_path / "nested.json", content)])
    assert found.rows[0] == read_suite("videomme", [write(tmp_path / "test.json", [VIDEOMME])]).rows[0]
    assert [(row["id"], row["answer"]) for row in found.rows] == [
        ("videomme:001-1", "C"), ("videomme:001-2", "A"), ("videomme:002-1", "C"), ("videomme:003-1", "C"),
    ]  # fmt: skip
    assert [Path(str(row["video"])).stem for row in found.rows] == ["fFjv93ACGo8"] * 2 + ["002", "fFjv93ACGo8"]
    assert [(error.source.rpartition("json:")[2], error.reason) for error in found.errors] == [
        ("1:3", "the question is a int, wanted an object"),
        ("4", "questions is [], wanted a list of questions, at least one"),
    ]


def test_videomme_parquet_gives_the_same_rows(tmp_path: Path):
    parquet = read_suite("videomme", [as_parquet(tmp_path / "test.parquet", [VIDEOMME])], tmp_path)
    assert parquet == read_suite("videomme", [write(tmp_path / "test.json", [VIDEOMME])], tmp_path)


def test_mvbench(tmp_path: Path):
    other = MVBENCH | {"answer": "Nothing of this."}
    twice = MVBENCH | {"candidates": ["Took the box.", "Took the box."], "answer": "Took the box."}
    files = [write(tmp_path / "action_sequence.json", [MVBENCH, other, twice])]
    files.append(write(tmp_path / "moving_count.json", [MVBENCH | {"video": "video_10009.mp4", "candidates": ["2", "3"],
                                                                  "answer": "3"}]))  # fmt: skip
    found = read_suite("mvbench", files, tmp_path / "video")
    first, second = found.rows
    assert (first["id"], first["answer"]) == ("mvbench:action_sequence:1", "C")
    assert first["video"] == str(tmp_path / "video" / "star" / "Charades_segment" / "ZS9XR.mp4")
    assert (second["id"], second["answer"], second["categories"]) == (
        "mvbench:moving_count:1",
        "B",
        {"task": "moving_count"},
    )
    assert [error.source for error in found.errors] == [f"{files[0]}:2", f"{files[0]}:3"]
    assert "which is 0 times among the candidates" in str(found.errors[0])
    with pytest.raises(ConfigError, match="is not named after a task of MVBench"):
        read_suite("mvbench", [write(tmp_path / "test.json", [MVBENCH])])
    assert len(MVBENCH_FOLDERS) == 20


def test_perception_test(tmp_path: Path):
    unanswered = {key: value for key, value in PERCEPTION.items() if key != "answer_id"} | {"id": 35}
    content = {
        "video_8241": {"metadata": {"video_id": "video_8241"}, "mc_question": [PERCEPTION, unanswered]},
        "video_2": {"metadata": {}, "mc_question": [PERCEPTION | {"answer_id": 3}]},
        "video_3": {"metadata": {}},
    }
    found = read_suite("perception_test", [write(tmp_path / "all_valid.json", content)])
    (row,) = found.rows
    assert (row["id"], row["answer"]) == ("perception_test:video_8241:34", "C")
    assert row["video"] == str(tmp_path / "video_8241.mp4")
    assert row["categories"] == {"area": "physics", "reasoning": "descriptive", "tag": ["motion", "camera"]}
    reasons = [str(error).partition(": ")[2] for error in found.errors]
    assert "key 'answer_id' is missing" in reasons[0]
    assert reasons[1] == "answer_id is 3, wanted 0 to 2"
    assert reasons[2] == "mc_question is None, wanted a list of questions"
    with pytest.raises(ConfigError, match="is not a JSON object of videos"):
        read_suite("perception_test", [write(tmp_path / "list.json", [PERCEPTION])])


def test_perception_test_parquet_gives_the_same_rows(tmp_path: Path):
    flat = {key: value for key, value in PERCEPTION.items() if key != "id"}
    flat |= {"video_name": "video_8241", "question_id": "34", "answer_id": "2"}
    parquet = read_suite("perception_test", [as_parquet(tmp_path / "val.parquet", [flat])])
    content = {"video_8241": {"metadata": {}, "mc_question": [PERCEPTION]}}
    assert parquet == read_suite("perception_test", [write(tmp_path / "all_valid.json", content)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": "A. Apples."}, "options is 'A. Apples.', wanted a list"),
        ({"options": ["A. Apples.", ""]}, "options[1] is '', wanted text"),
        ({"answer": "E"}, "answer is 'E', wanted one letter from A to D"),
        ({"videoID": None}, "videoID is None, wanted text"),
        ({"duration": 5}, "duration is 5, wanted text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change, reason):
    found = read_suite("videomme", [write(tmp_path / "test.json", [VIDEOMME | change, VIDEOMME, VIDEOMME, 7])])
    assert len(found.rows) == 1
    assert [error.source.rpartition(":")[2] for error in found.errors] == ["1", "3", "4"]
    assert reason in str(found.errors[0]) and "is already taken by" in str(found.errors[1])


def test_the_command_writes_rows_that_evaluation_loads(tmp_path: Path, capsys):
    write(tmp_path / "test.json", [VIDEOMME, VIDEOMME | {"question_id": "001-2", "answer": 4}])
    tokens = [
        str(tmp_path / "test.json"),
        "--output",
        str(tmp_path / "out" / "short.jsonl"),
        "--only",
        "duration=short",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main(["suite", "videomme", *tokens])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and "test.json:2: answer is 4" in err
    counts = json.loads(out.splitlines()[-1])
    assert (counts["rows"], counts["bad"], counts["videos"], counts["missing_videos"]) == (1, 1, 1, 1)
    source = AnnotationSource(tmp_path / "out" / "short.jsonl")
    (content,) = read_annotation_files([source], make_tasks(TaskConfig()))
    examples = content.examples
    assert content.errors == []
    assert examples[0].truth == ChoiceTruth("C", ("Apples.", "Candles.", "Berries.", "All alike."))
    assert examples[0].video == str(tmp_path / "fFjv93ACGo8.mp4")
    assert ("task_type", "Counting Problem") in examples[0].categories


def test_a_suite_without_a_usable_question_fails(tmp_path: Path, capsys):
    write(tmp_path / "test.json", [{"question": "?"}])
    with pytest.raises(SystemExit) as end:
        cli.main(["suite", "videomme", str(tmp_path / "test.json"), "--output", str(tmp_path / "o.jsonl")])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "no usable question of videomme" in err and "key 'question_id' is missing" in err
    assert not (tmp_path / "o.jsonl").exists()


def test_questions_are_chosen_by_one_of_several_tags(tmp_path: Path):
    other = PERCEPTION | {"id": 35, "tag": ["motion"], "area": None}
    content = {"video_1": {"mc_question": [PERCEPTION, other, PERCEPTION | {"id": 36, "tag": []}]}}
    file = write(tmp_path / "all_valid.json", content)
    camera = read_suite("perception_test", [file], only={"tag": "camera"})
    assert [row["id"] for row in camera.rows] == ["perception_test:video_1:34"]
    motion = read_suite("perception_test", [file], only={"tag": "motion"})
    assert [row["categories"] for row in motion.rows[1:]] == [{"reasoning": "descriptive", "tag": ["motion"]}]
    with pytest.raises(ConfigError, match="no question has tag=x; tag is one of: camera, motion"):
        read_suite("perception_test", [file], only={"tag": "x"})
