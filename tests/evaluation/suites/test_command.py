"""`vcr1-fast suite`: what is written, named, chosen and counted, and the benchmarks' own means of what eval gives."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.command_line import run
from tests.evaluation.suites.test_choice_suites import VIDEOMME
from vcr1_fast.evaluation.samples import Sample
from vcr1_fast.evaluation.suites import SUITES
from vcr1_fast.evaluation.suites.command import benchmark_score, describe, read_suite
from vcr1_fast.prompts.dataset import AnnotationSource, read_annotation_files
from vcr1_fast.settings.config import ConfigError, TaskConfig
from vcr1_fast.tasks import TASKS, make_tasks
from vcr1_fast.types import ChoiceTruth, NumberTruth

DOCS = Path(__file__).parents[3] / "docs" / "suites.md"


def write(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "reason", "num_rows"),
    [
        ({"options": "A. Apples."}, "options is 'A. Apples.', wanted a list", 1),
        ({"videoID": None}, "videoID is None, wanted text", 1),
        ({"duration": 5}, "duration is 5, wanted text", 1),
        ({"options": ["A. Apples.", ""]}, "options[1] is '', wanted text", 2),  # kept: eval refuses it, and counts it
        ({"answer": "E"}, "answer is 'E', wanted one letter from A to D; eval will count it as wrong", 2),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change, reason, num_rows):
    content = [VIDEOMME | {"question_id": "0"} | change, VIDEOMME, VIDEOMME, 7]
    found = read_suite("videomme", [write(tmp_path / "test.json", content)])
    assert (len(found.rows), found.num_refused) == (num_rows, num_rows - 1)
    by_row = {error.source.rpartition(":")[2]: error.reason for error in found.errors}
    assert sorted(by_row) == ["1", "3", "4"]
    assert reason in by_row["1"] and "is already taken by" in by_row["3"]
    assert by_row["4"] == "the row is a int, wanted an object"


def test_what_is_written_is_what_evaluation_loads(tmp_path: Path, capsys):
    """The refused row stays in the denominator: it is read as a refused example."""
    refused = VIDEOMME | {"question_id": "001-2", "answer": 4}
    long = VIDEOMME | {"question_id": "601-1", "duration": "long"}
    file = write(tmp_path / "test.json", [VIDEOMME, refused, long, 7])
    output = tmp_path / "out" / "short.jsonl"
    code, out, err = run(capsys, "suite", "videomme", file, "--output", output, "--only", "duration=short")
    assert code == 0 and "test.json:2: answer is 4" in err
    counts = json.loads(out.splitlines()[-1])
    assert counts == {
        "suite": "videomme",
        "output": str(output),
        "rows": 2,
        "refused": 1,
        "left_out": 1,
        "videos": 1,
        "missing_videos": 1,
    }
    (content,) = read_annotation_files([AnnotationSource(output)], make_tasks(TaskConfig()))
    usable, wrong = content.rows
    assert usable.truth == ChoiceTruth("C", ("Apples.", "Candles.", "Berries.", "All alike."))
    assert usable.video == str(tmp_path / "fFjv93ACGo8.mp4")
    assert ("task_type", "Counting Problem") in usable.categories
    assert ("suite", "videomme") in usable.categories
    assert wrong.is_refused and wrong.categories == usable.categories


def test_numbers_and_choices_of_one_suite_are_loaded_as_two_tasks(tmp_path: Path, capsys):
    row = {"id": 7, "dataset": "scannet", "scene_name": "scene0", "question": "How far?"}
    number = row | {"question_type": "object_abs_distance", "ground_truth": "2.5"}
    choice = row | {"id": 8, "question_type": "route_planning", "ground_truth": "A", "options": ["A. left", "B. right"]}
    file, output = write(tmp_path / "test.json", [number, choice]), tmp_path / "vsi.jsonl"
    assert run(capsys, "suite", "vsibench", file, "--output", output)[0] == 0
    (content,) = read_annotation_files([AnnotationSource(output)], make_tasks(TaskConfig()))
    assert [(row.task, row.truth) for row in content.rows] == [
        ("numeric_answer", NumberTruth(2.5)),
        ("multiple_choice", ChoiceTruth("A", ("left", "right"), scoring="vsibench")),
    ]


def test_folders_of_images_are_looked_for_without_their_fragment(tmp_path: Path, capsys):
    entry = {"video": "clip", "question": "q", "candidates": ["a", "b"], "answer": "b", "start": 1.0, "end": 9.0}
    file = write(tmp_path / "episodic_reasoning.json", [entry])
    (tmp_path / "tvqa" / "frames_fps3_hq" / "clip").mkdir(parents=True)
    _, out, _ = run(capsys, "suite", "mvbench", file, "--output", tmp_path / "o.jsonl")
    assert json.loads(out.splitlines()[-1])["missing_videos"] == 0


def test_a_suite_without_a_usable_row_fails(tmp_path: Path, capsys):
    output = tmp_path / "o.jsonl"
    for content, reason in (
        ([{"question": "?"}], "key 'question_id' is missing"),
        ([VIDEOMME | {"answer": "E"}], "answer is 'E'"),
        ({"a": {"b": 1}}, "is not a list of rows: name another file or suite"),
    ):
        code, _, err = run(capsys, "suite", "videomme", write(tmp_path / "test.json", content), "--output", output)
        assert code == 1 and reason in err
        assert not output.exists()


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["videomme", "a.json"], "wanted at least one FILE and --output"),
        (["videomme", "--output", "o.jsonl"], "wanted at least one FILE"),
        (["videomme", "a.json", "--output", "o", "--only", "duration"], "--only wants AXIS=VALUE"),
        (["videomme", "a.json", "--output", "o", "--subtitle-frames", "8"], "--subtitle-frames wants"),
        (["videome", "a.json", "--output", "o"], "invalid choice: 'videome'"),
    ],
)
def test_wrong_usage(capsys, tokens, reason):
    code, _, err = run(capsys, "suite", *tokens)
    assert code == 2 and reason in err


def test_the_list_describes_every_suite(capsys):
    code, out, _ = run(capsys, "suite", "list")
    assert code == 0
    for suite in SUITES.values():
        assert f"{suite.name}: {suite.title}\n" in out
        assert all(f"{text}\n" in out for text in describe(suite).values())
        assert set(suite.tasks) <= set(TASKS)


def test_the_page_about_suites_says_what_the_list_says():
    page = DOCS.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == list(SUITES)
    for name, suite in SUITES.items():
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
        assert cells[1:] == [suite.title, *describe(suite).values()]


def sample(name: str, value: float, categories: dict[str, str], task: str = "multiple_choice") -> Sample:
    metric = {"multiple_choice": "acc", "numeric_answer": "mra"}[task]
    axes = {axis: [one] for axis, one in categories.items()}
    return Sample(name, task, "v.mp4", "q", "a", {}, {metric: value}, "", "stop", 3, axes)


def vsi(number: int, value: float, kind: str, of_task: str = "", task: str = "multiple_choice") -> Sample:
    categories = {"suite": "vsibench", "task": of_task or kind, "question_type": kind}
    return sample(f"vsi:{number}", value, categories, task)  # eval gives a refused row an id of its own


def test_a_benchmark_averages_over_its_tasks(tmp_path: Path, capsys):
    """VSI-Bench: directions are the mean of their three kinds, whatever their numbers."""
    samples = [
        vsi(1, 1.0, "object_rel_direction_easy", "object_rel_direction"),
        vsi(2, 0.0, "object_rel_direction_medium", "object_rel_direction"),
        vsi(3, 0.0, "object_rel_direction_medium", "object_rel_direction"),
        vsi(4, 0.5, "object_rel_direction_hard", "object_rel_direction"),
        vsi(5, 0.3, "object_counting", task="numeric_answer"),
        vsi(6, 0.9, "object_counting", task="numeric_answer"),
    ]
    score, by_task = benchmark_score(samples, SUITES["vsibench"].average)
    assert by_task == pytest.approx({"object_counting": 0.6, "object_rel_direction": 0.5})
    assert score == pytest.approx(0.55)
    assert benchmark_score(samples, ()) == (pytest.approx(2.7 / 6), {})
    lines = tmp_path / "samples.jsonl"
    other = sample("mine:1", 1.0, {"suite": "mvbench"})
    lines.write_text("".join(json.dumps(asdict(each)) + "\n" for each in [*samples, other]))
    code, out, _ = run(capsys, "suite", "vsibench", "--samples", lines)
    assert code == 0
    assert json.loads(out)["score"] == pytest.approx(0.55) and json.loads(out)["n"] == 6
    code, _, err = run(capsys, "suite", "mlvu", "--samples", lines)
    assert code == 1 and "holds 0 samples of mlvu" in err
    with pytest.raises(ConfigError, match="sample mine:1 has no category task"):
        benchmark_score([other], ("task",))


def test_rows_are_chosen_by_one_of_several_tags(tmp_path: Path):
    question = {"question": "?", "options": ["No", "Yes"], "answer_id": 1, "reasoning": "descriptive"}
    questions = [
        question | {"id": 34, "tag": ["motion", "camera"]},
        question | {"id": 35, "tag": ["motion"]},
        question | {"id": 36, "tag": []},
    ]
    file = write(tmp_path / "all_valid.json", {"video_1": {"mc_question": questions}})
    camera = read_suite("perception_test", [file], only={"tag": "camera"})
    assert [row["id"] for row in camera.rows] == ["perception_test:video_1:34"]
    motion = read_suite("perception_test", [file], only={"tag": "motion"})
    assert [row["categories"] for row in motion.rows[1:]] == [{"reasoning": "descriptive", "tag": ["motion"]}]
    with pytest.raises(ConfigError, match="no row has tag=x; tag is one of: camera, motion"):
        read_suite("perception_test", [file], only={"tag": "x"})
