"""Two runs on the same examples: what is paired, what is left out, and the numbers by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import vcr1_fast.cli as cli
from vcr1_fast.evaluation.compare import compare_samples
from vcr1_fast.evaluation.samples import Sample, read_samples, write_lines
from vcr1_fast.settings.config import ConfigError


def sample(name: str, score: float, video: str | None = None, task: str = "multiple_choice") -> Sample:
    video = video or f"/data/{name}.mp4"
    return Sample(name, task, video, "which?", "<answer>A</answer>", {}, {"acc": score}, "", "stop", 5)


def line(**changes: object) -> str:
    return json.dumps({**asdict(sample("p", 0.5)), **changes}) + "\n"


def test_differences_by_hand():
    """A: 0 0 0 1, B: 1 1 1 1. Three videos rise by 1, one stays: of the 16 sign choices 4 reach |sum| 3."""
    a = [sample(name, score) for name, score in zip("pqrs", (0, 0, 0, 1), strict=True)]
    b = [sample(name, 1.0) for name in "srqp"]
    found = compare_samples(a, b)
    task = found.tasks["multiple_choice"]
    acc = task.metrics["acc"]
    assert (task.num_matched, task.num_videos) == (4, 4)
    assert (acc.a, acc.b, acc.difference, acc.p_value) == (0.25, 1.0, 0.75, 0.25)
    # a resample's mean is k/4 with k ~ binomial(4, 3/4): P(k <= 1) is 5.1 %, P(k = 0) 0.4 %, P(k = 4) 31.6 %
    assert acc.interval == (0.25, 1.0)
    assert (found.only_in_a, found.only_in_b) == ([], [])


def test_questions_about_one_video_are_one_observation():
    """Both rise, but there is only one video: nothing can be said."""
    a, b = ([sample(name, score, "v.mp4") for name in "pq"] for score in (0.0, 1.0))
    acc = compare_samples(a, b).tasks["multiple_choice"].metrics["acc"]
    assert (acc.difference, acc.interval, acc.p_value) == (1.0, None, 1.0)


def test_what_only_one_run_has_is_named():
    a = [sample("p", 1.0), sample("q", 0.0)]
    b = [sample("q", 1.0), sample("r", 1.0), sample("p", 0.0, task="grounded_qa")]
    found = compare_samples(a, b)
    assert found.only_in_a == ["multiple_choice:p"]
    assert found.only_in_b == ["multiple_choice:r", "grounded_qa:p"]
    assert found.tasks["multiple_choice"].num_matched == 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([sample("p", 1.0)], [sample("q", 1.0)], "no example is in both files: 1 samples such as 'p' and 1 such as"),
        ([sample("p", 1.0), sample("p", 0.0)], [sample("p", 1.0)], "the first file has two samples multiple_choice:p"),
        ([sample("p", 1.0)], [sample("p", 1.0, "/x/other.mp4")], "these are not the same examples"),
        (
            [sample("p", 1.0)],
            [sample("p", 1.0), replace(sample("q", 1.0), metrics={"miou": 0.5})],
            "the second file: multiple_choice:q has other metrics than p",
        ),
    ],
)
def test_runs_that_cannot_be_compared(a, b, message):
    with pytest.raises(ConfigError, match=message):
        compare_samples(a, b)


def test_the_same_videos_in_another_folder_are_the_same_examples():
    found = compare_samples([sample("p", 1.0, "/here/p.mp4")], [sample("p", 0.0, "/there/p.mp4")])
    assert found.tasks["multiple_choice"].metrics["acc"].difference == -1.0


def test_command_prints_a_table_and_one_json_line(tmp_path: Path, capsys):
    write_lines(tmp_path / "a.jsonl", [sample(n, 0.0) for n in "pqrst"])
    write_lines(tmp_path / "b.jsonl", [sample(n, 1.0) for n in "pqrsu"])
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    out, err = capsys.readouterr()
    assert end.value.code == 0
    assert "multiple_choice: 4 examples, 4 videos" in out and "+1.000 .. +1.000" in out
    assert "1 samples are only in" in err and "multiple_choice:t" in err and "multiple_choice:u" in err
    line = json.loads(out.splitlines()[-1])
    assert line["tasks"]["multiple_choice"]["metrics"]["acc"]["p_value"] == 0.125  # 2 of 16 sign choices
    assert (line["num_only_in_a"], line["only_in_b"]) == (1, ["multiple_choice:u"])


def test_names_that_rich_would_take_for_markup(tmp_path: Path, capsys):
    (tmp_path / "a.jsonl").write_text(line(task="[/b]", metrics={"[/x]": 1.0}))
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl")])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "[/b]: 1 examples" in out and "[/x]" in out.partition("metric")[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the samples"),
        ("", "holds no sample"),
        ('{"id": "p"}\n', "bad.jsonl:1 is no line of a samples.jsonl"),
        ("[1]\n", "bad.jsonl:1 is no line of a samples.jsonl"),
        ("not json\n", "bad.jsonl:1 is no line of a samples.jsonl"),
        ("[" * 5000, "bad.jsonl:1 is no line of a samples.jsonl"),
        (line(video=3), "bad.jsonl:1 is no line of a samples.jsonl: id, task, video or metrics are of the wrong type"),
        (line(metrics={"m": 10**400}), "bad.jsonl:1 is no line of a samples.jsonl: int too large"),
        (line(metrics={"m": float("nan")}), "bad.jsonl:1 is no line of a samples.jsonl"),
        (line(metrics={"m": "1"}), "bad.jsonl:1 is no line of a samples.jsonl"),
    ],
)
def test_files_that_hold_no_samples(tmp_path: Path, capsys, content, message):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(file), str(file)])
    assert end.value.code == 1 and message in capsys.readouterr().err


def test_samples_read_back_equal(tmp_path: Path):
    samples = [sample("p", 0.5), replace(sample("q", 0.0), answer="ä\u2028\n", failure="the file is empty")]
    write_lines(tmp_path / "s.jsonl", samples)
    assert read_samples(tmp_path / "s.jsonl") == samples
    later = ("truth", "parsed", "times_s")  # fields that older files lack
    rows = [{key: value for key, value in row.items() if key not in later} for row in map(asdict, samples)]
    write_lines(tmp_path / "old.jsonl", rows)
    assert read_samples(tmp_path / "old.jsonl") == samples
