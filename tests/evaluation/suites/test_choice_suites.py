"""Multiple-choice benchmarks as they are published -> rows that the task takes, with categories."""

import json
from pathlib import Path

import pytest

from vcr1_fast.evaluation.suites.command import read_suite
from vcr1_fast.evaluation.suites.mvbench import MVBENCH_FOLDERS
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.video.source_name import SourceName

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
    with pytest.raises(ConfigError, match="no row has duration=tiny; duration is one of: long, short"):
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
    twice = MVBENCH | {"candidates": ["Ate.", "Took the box.", "Took the box."], "answer": "Took the box."}
    files = [write(tmp_path / "action_sequence.json", [MVBENCH, other, twice])]
    count = {"video": "video_10009.mp4", "candidates": ["2", "3"], "answer": "3"}
    files.append(write(tmp_path / "moving_count.json", [MVBENCH | count]))
    found = read_suite("mvbench", files, tmp_path / "video")
    first, refused, doubled, second = found.rows
    assert (first["id"], first["answer"]) == ("mvbench:action_sequence:1", "C")
    assert first["video"] == str(tmp_path / "video" / "star" / "Charades_segment" / "ZS9XR.mp4")
    assert doubled["answer"] == "B"  # the first of the two
    assert (second["id"], second["answer"], second["categories"]) == (
        "mvbench:moving_count:1",
        "B",
        {"task": "moving_count"},
    )
    # it stays in the denominator
    assert refused["answer"] == "Nothing of this." and found.num_refused == 1
    (error,) = found.errors
    assert error.source == f"{files[0]}:2" and "wanted one letter from A to D; eval will count it" in str(error)
    with pytest.raises(ConfigError, match="is not named after a task of MVBench"):
        read_suite("mvbench", [write(tmp_path / "test.json", [MVBENCH])])
    assert len(MVBENCH_FOLDERS) == 20


def test_mvbench_shows_the_frames_of_tvqa_at_three_a_second(tmp_path: Path):
    entry = MVBENCH | {"video": "castle_s03e05_seg02_clip_13", "start": 11.1, "end": 19.6}
    file = write(tmp_path / "episodic_reasoning.json", [entry])
    cut = tmp_path / "tvqa" / "video_fps3_hq_segment" / "castle_s03e05_seg02_clip_13"
    uncut = tmp_path / "tvqa" / "frames_fps3_hq" / "castle_s03e05_seg02_clip_13"

    def video() -> object:
        return read_suite("mvbench", [file]).rows[0]["video"]

    assert video() == f"{cut}.mp4"
    uncut.mkdir(parents=True)
    assert video() == f"{uncut}#images=all&fps=3#t=11.100,19.600"
    name = SourceName.parse(str(video()))
    assert (name.path, name.images_fps, name.start_s, name.end_s) == (str(uncut), 3.0, 11.1, 19.6)
    cut.mkdir(parents=True)
    assert video() == f"{cut}#images=all&fps=3"
    cut.rmdir()
    (cut.parent / f"{cut.name}.mp4").touch()
    assert video() == f"{cut}.mp4"  # a file says itself how fast it is


def test_perception_test(tmp_path: Path):
    unanswered = {key: value for key, value in PERCEPTION.items() if key != "answer_id"} | {"id": 35}
    content = {
        "video_8241": {"metadata": {"video_id": "video_8241"}, "mc_question": [PERCEPTION, unanswered]},
        "video_2": {"metadata": {}, "mc_question": [PERCEPTION | {"answer_id": 3}]},
        "video_3": {"metadata": {}},
        "video_4": {"metadata": {}, "mc_question": []},  # annotated for another task of the benchmark
    }
    found = read_suite("perception_test", [write(tmp_path / "all_valid.json", content)])
    (row,) = found.rows
    assert (row["id"], row["answer"]) == ("perception_test:video_8241:34", "C")
    assert row["video"] == str(tmp_path / "video_8241.mp4")
    assert row["categories"] == {"area": "physics", "reasoning": "descriptive", "tag": ["motion", "camera"]}
    reasons = [str(error).partition(": ")[2] for error in found.errors]
    assert "key 'answer_id' is missing" in reasons[0]
    assert reasons[1] == "answer_id is 3, wanted 0 to 2"
    assert reasons[2:] == ["mc_question is None, wanted a list of questions, at least one"]
    with pytest.raises(ConfigError, match="is not a JSON object of videos"):
        read_suite("perception_test", [write(tmp_path / "list.json", [PERCEPTION])])


def test_perception_test_parquet_gives_the_same_rows(tmp_path: Path):
    flat = {key: value for key, value in PERCEPTION.items() if key != "id"}
    flat |= {"video_name": "video_8241", "question_id": "34", "answer_id": "2"}
    parquet = read_suite("perception_test", [as_parquet(tmp_path / "val.parquet", [flat])])
    content = {"video_8241": {"metadata": {}, "mc_question": [PERCEPTION]}}
    assert parquet == read_suite("perception_test", [write(tmp_path / "all_valid.json", content)])


LVB = {
    "video_id": "86CxyhFV9MI",
    "question": "Which subtitles appear when the man in grey is on stage?",
    "candidates": ["one", "two", "three", "four"],
    "correct_choice": 1,
    "topic_category": "NP-News-Programs",
    "question_category": "TOS",
    "level": "L2-Relation",
    "id": "86CxyhFV9MI_0",
    "video_path": "86CxyhFV9MI.mp4",
    "subtitle_path": "86CxyhFV9MI_en.json",
    "duration_group": 600,
    "duration": 190.16,
}


def without(entry: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in entry.items() if key not in keys}


def test_longvideobench(tmp_path: Path):
    entries = [
        LVB,
        LVB,  # its id is taken
        without(LVB, "correct_choice") | {"id": "b"},  # of the test split
        LVB | {"id": "c", "correct_choice": 4},
        LVB | {"id": "d", "candidates": ["one", ""], "correct_choice": 0},
    ]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "86CxyhFV9MI.mp4").touch()
    found = read_suite("longvideobench", [write(tmp_path / "lvb_val.json", entries)])
    first, refused = found.rows
    assert first == {
        "id": "longvideobench:86CxyhFV9MI_0",
        "task": "multiple_choice",
        "video": str(tmp_path / "videos" / "86CxyhFV9MI.mp4"),
        "query": LVB["question"],
        "options": ["one", "two", "three", "four"],
        "answer": "B",
        "categories": {
            "duration_group": "600",
            "question_category": "TOS",
            "topic_category": "NP-News-Programs",
            "level": "L2-Relation",
        },
    }
    assert refused["id"] == "longvideobench:d" and found.num_refused == 1
    reasons = [error.reason for error in found.errors]
    assert "is already taken by" in reasons[0]
    assert reasons[1].startswith("key 'correct_choice' is missing")
    assert reasons[2] == "correct_choice is 4, wanted 0 to 3"
    assert reasons[3].startswith("options[1] is ''")


def test_longvideobench_parquet_gives_the_same_rows(tmp_path: Path):
    flat = without(LVB, "candidates") | {f"option{i}": text for i, text in enumerate(["one", "two", "three", "four"])}
    parquet = read_suite("longvideobench", [as_parquet(tmp_path / "v.parquet", [flat | {"option4": "N/A"}])])
    assert parquet == read_suite("longvideobench", [write(tmp_path / "lvb_val.json", [LVB])])


MLVU = {
    "video": "movie101_66.mp4",
    "duration": 246,
    "question": "What color is the main male character in the video?",
    "candidates": ["Yellow", "Red", "Green", "Blue"],
    "answer": "Yellow",
    "question_type": "plotQA",
}


def test_mlvu(tmp_path: Path):
    entries = [
        MLVU,
        MLVU | {"candidates": ["Six", "Three", "Three", "Eight"], "answer": "Three"},
        MLVU | {"candidates": ["", "Yellow"]},
        MLVU | {"answer": "Pink"},
        without(MLVU, "candidates"),  # a summary
    ]
    found = read_suite("mlvu", [write(tmp_path / "1_plotQA.json", entries)])
    assert [(row["id"], row["answer"]) for row in found.rows] == [
        ("mlvu:plotQA:1", "A"),
        ("mlvu:plotQA:2", "C"),  # the last of the two, as in choice_bench.py
        ("mlvu:plotQA:3", "B"),
        ("mlvu:plotQA:4", "Pink"),
    ]
    assert found.rows[0]["video"] == str(tmp_path / "video" / "1_plotQA" / "movie101_66.mp4")
    assert found.rows[2]["options"] == ["-", "Yellow"]
    assert found.rows[0]["categories"] == {"task": "plotQA"}
    assert [error.source.rpartition(":")[2] for error in found.errors] == ["5", "4"] and found.num_refused == 1
    for folder in ("video", "video/plotQA", "video/1_plotQA"):  # each before those that were there
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "movie101_66.mp4").touch()
        row = read_suite("mlvu", [tmp_path / "1_plotQA.json"]).rows[0]
        assert row["video"] == str(tmp_path / folder / "movie101_66.mp4")
    test = MLVU | {"question_id": "SP_1", "question_type": "sportsQA", "answer": "Blue"}
    (row,) = read_suite("mlvu", [write(tmp_path / "test_mcq_gt.json", [test])]).rows
    assert (row["id"], row["answer"]) == ("mlvu:SP_1", "D")
    assert row["video"] == str(tmp_path / "video" / "movie101_66.mp4")


def test_lvbench(tmp_path: Path):
    question = {
        "uid": "0",
        "question": "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363 (or so)\n(D) 1633",
        "answer": "D",
        "question_type": ["key information retrieval", "reasoning"],
        "time_reference": "00:15-00:19",
    }
    odd = [
        question | {"uid": "1", "question": "No options"},
        question | {"uid": "2", "question": "q\n(A) a\n(C) c"},
        question | {"uid": "3", "answer": "E"},
        7,
    ]
    lines = [
        {"key": "Cm73ma6Ibcs", "type": "cartoon", "qa": [question, *odd]},
        {"key": "b", "qa": []},
        {"qa": [question]},
    ]
    file = tmp_path / "video_info.meta.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    found = read_suite("lvbench", [file])
    first, refused = found.rows
    assert (first["id"], first["query"], first["answer"]) == ("lvbench:0", "What year appears?", "D")
    assert first["options"] == ["1636", "1366", "1363 (or so)", "1633"]
    assert first["video"] == str(tmp_path / "Cm73ma6Ibcs.mp4")
    assert first["categories"] == {"question_type": ["key information retrieval", "reasoning"]}
    assert (refused["id"], found.num_refused) == ("lvbench:3", 1)
    assert [(error.source.partition("jsonl:")[2], error.reason[:46]) for error in found.errors] == [
        ("1:2", "question has the options none, wanted lines (A"),
        ("1:3", "question has the options A, C, wanted lines (A"),
        ("1:5", "the question is a int, wanted an object"),
        ("2", "qa is [], wanted a list of questions, at least"),
        ("3", "key 'key' is missing; the row has qa"),
        ("1:4", "answer is 'E', wanted one letter from A to D; "),
    ]


VSI_CHOICE = {
    "id": 0,
    "dataset": "arkitscenes",
    "scene_name": "41069025",
    "question_type": "object_rel_direction_hard",
    "question": "Where is the sofa?",
    "ground_truth": "B",
    "options": ["A. left", "B. right", "C. back"],
}
VSI_NUMBER = VSI_CHOICE | {"id": 1, "question_type": "object_counting", "ground_truth": "4", "options": None}


def test_vsibench(tmp_path: Path):
    odd = [
        VSI_NUMBER | {"id": 2, "ground_truth": "many"},
        VSI_NUMBER | {"id": 3, "question_type": "object_colour"},
        VSI_CHOICE | {"id": 4, "options": None},
        without(VSI_CHOICE, "scene_name") | {"id": 5},
    ]
    found = read_suite("vsibench", [write(tmp_path / "test.json", [VSI_CHOICE, VSI_NUMBER, *odd])])
    choice, number, refused = found.rows
    video = str(tmp_path / "arkitscenes" / "41069025.mp4")
    assert (choice["task"], choice["answer"], choice["video"]) == ("multiple_choice", "B", video)
    assert choice["options"] == ["A. left", "B. right", "C. back"]
    assert choice["categories"] == {
        "task": "object_rel_direction",
        "question_type": "object_rel_direction_hard",
        "dataset": "arkitscenes",
    }
    assert number == {
        "id": "vsibench:1",
        "task": "numeric_answer",
        "video": video,
        "query": "Where is the sofa?",
        "answer": "4",
        "categories": {"task": "object_counting", "question_type": "object_counting", "dataset": "arkitscenes"},
    }
    assert refused["id"] == "vsibench:2" and found.num_refused == 1
    reasons = [error.reason for error in found.errors]
    assert reasons[0].startswith("question_type is 'object_colour', wanted one of object_rel_direction_easy")
    assert reasons[1] == "options is None, wanted a list of 2 to 26 texts"
    assert reasons[2].startswith("key 'scene_name' is missing")
    assert reasons[3].startswith("answer is 'many', wanted a number")


def test_vsibench_parquet_gives_the_same_rows(tmp_path: Path):
    parquet = read_suite("vsibench", [as_parquet(tmp_path / "test.parquet", [VSI_CHOICE, VSI_NUMBER])])
    assert parquet == read_suite("vsibench", [write(tmp_path / "test.json", [VSI_CHOICE, VSI_NUMBER])])
