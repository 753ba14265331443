"""`vcr1-fast score`: answers from elsewhere, scored by hand, and files of no use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.command_line import run

ROW = {"task": "temporal_grounding", "video": "a.mp4", "query": "a dog barks", "duration_s": 30.0}
ROWS = [ROW | {"id": name, "intervals": [interval]} for name, interval in (("a", [3.3, 5.8]), ("b", [20, 31]))]
SENTENCE = "The event happens from 3.0 to 5.0 seconds."  # 1.7 s shared with 3.3 to 5.8, 2.8 in all


def written(file: Path, *rows: object) -> Path:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def said(name: object, answer: object) -> Mapping[str, object]:
    return {"id": name, "answer": answer, "model": "another"}


def test_a_task_by_hand(tmp_path: Path, capsys):
    file = written(tmp_path / "rows.jsonl", *ROWS)
    answers = written(tmp_path / "answers.jsonl", said("a", SENTENCE), "", said("b", "<answer>20 to 30</answer>"))
    code, out, err = run(capsys, "score", "temporal_grounding", file, answers)
    result = json.loads(out.splitlines()[-1])
    assert (code, err, result["n"], result["num_missing"]) == (0, "", 2, 0)
    assert result["metrics"]["miou"] == pytest.approx((1.7 / 2.8 + 10 / 11) / 2)  # the truth is as the file has it
    assert (result["readable"], result["well_formed"]) == (1.0, 0.0)  # without a think block
    assert any(line.split()[:4] == ["temporal_grounding", "n", "=", "2"] for line in out.splitlines())

    code, out, _ = run(
        capsys, "score", "temporal_grounding", file, answers, "--task.recipe", "fixed", "--task.think=false"
    )
    result = json.loads(out.splitlines()[-1])
    assert result["metrics"]["miou"] == pytest.approx((1.7 / 2.8 + 1) / 2)  # the truth is cut to 20 to 30
    assert (code, result["recipe"], result["readable"], result["well_formed"]) == (0, "fixed", 1.0, 0.5)


def test_what_is_missing_or_refused_is_wrong(tmp_path: Path, capsys):
    file = written(
        tmp_path / "rows.jsonl", *ROWS, ROW | {"intervals": [[5, 2]]}, ROW | {"id": 7, "intervals": [[1, 2]]}
    )
    answers = written(tmp_path / "answers.jsonl", said("a", SENTENCE), said(7, "1 to 2"))
    code, out, err = run(capsys, "score", "temporal_grounding", file, answers, "--task.recipe=fixed")
    result = json.loads(out.splitlines()[-1])
    assert (code, result["n"], result["num_missing"], result["num_refused"]) == (0, 4, 1, 1)
    assert result["metrics"]["miou"] == pytest.approx((1.7 / 2.8 + 0 + 0 + 1) / 4)
    assert result["readable"] == 2 / 4
    assert "bad annotation: " in err and "1 of 4 examples have no answer, counted as wrong" in err
    written(answers, said("a", SENTENCE), said(7, "1 to 2"), said("b", ""), said("the refused", "5 to 2"))
    code, out, err = run(capsys, "score", "temporal_grounding", file, answers, "--task.recipe=fixed")
    assert (code, json.loads(out.splitlines()[-1])["num_missing"]) == (0, 0)
    assert f"{answers}:4: no example has the id 'the refused'; passed over, as 1 rows are refused" in err
    written(answers, said("x", ""), said("y", ""))
    code, _, err = run(capsys, "score", "temporal_grounding", file, answers, "--task.recipe=fixed")
    assert code == 1 and f"2 lines of {answers} cannot be used" in err


def test_a_suite_as_it_is_published(tmp_path: Path, capsys):
    """MVBench's rule takes small letters and the text of an option with its letter; Video-MME's capitals alone."""
    question = {"video": "v.mp4", "question": "what?", "candidates": ["cat", "dog", "car"], "answer": "dog"}
    file = written(tmp_path / "action_antonym.json", json.dumps([question] * 3))
    names = [f"mvbench:action_antonym:{number}" for number in (1, 2, 3)]
    rows = [said(names[0], "b"), said(names[1].removeprefix("mvbench:"), "B. dog"), said(names[2], "dog")]
    code, out, err = run(capsys, "score", "mvbench", file, written(tmp_path / "answers.jsonl", *rows))
    result = json.loads(out.splitlines()[-1])
    assert (code, err, result["name"], result["n"]) == (0, "", "mvbench", 3)
    assert result["benchmark_score"] == pytest.approx(2 / 3)
    assert (result["metrics"], result["readable"]) == ({"acc": pytest.approx(2 / 3)}, pytest.approx(2 / 3))

    rows = [{"id": name, "task": "multiple_choice", "video": "v.mp4", "query": "what?"} for name in ("1", "2")]
    file = written(tmp_path / "own.jsonl", *(row | {"options": ["cat", "dog"], "answer": "B"} for row in rows))
    answers = written(tmp_path / "own_answers.jsonl", said("1", "b"), said("2", "(B)"))
    assert json.loads(run(capsys, "score", "multiple_choice", file, answers)[1].splitlines()[-1])["metrics"] == {
        "acc": 0.5
    }


def test_answers_that_cannot_be_used_are_named_line_by_line(tmp_path: Path, capsys):
    file = written(tmp_path / "rows.jsonl", *ROWS)
    lines = [
        said("a", "x"),
        said("A", "x"),
        "{",
        "[1]",
        said("a", "y"),
        said("b", None),
        {"answer": "x"},
        said(True, ""),
    ]
    answers = written(tmp_path / "answers.jsonl", *lines)
    code, out, err = run(capsys, "score", "temporal_grounding", file, answers)
    wanted = [
        ":2: no example has the id 'A'",
        ":3: Expecting property name enclosed in double quotes: line 1 column 2 (char 1), wanted {",
        ":4: the line is a list, wanted {",
        ":5: id 'a' is answered in line 1 already",
        ":6: answer is None, wanted {",
        ":7: id is None, wanted {",
        ":8: id is True, wanted {",
    ]
    *named, last = err.splitlines()
    assert (code, out, len(named)) == (1, "", len(wanted))
    assert all(line.startswith(f"{answers}{start}") for line, start in zip(named, wanted, strict=True))
    assert last == f"vcr1-fast: error: 7 lines of {answers} cannot be used, see above: nothing was scored"


def test_files_and_names_of_no_use(tmp_path: Path, capsys):
    file = written(tmp_path / "rows.jsonl", *ROWS)
    answers = written(tmp_path / "answers.jsonl", said("a", "x"))
    code, _, err = run(capsys, "score", "temporal_grounding", file, tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl: No such file or directory; wanted JSONL in UTF-8" in err
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "answer": "\xe9"}')
    code, _, err = run(capsys, "score", "temporal_grounding", file, tmp_path / "latin.jsonl")
    assert code == 1 and "latin.jsonl: 'utf-8' codec can't decode" in err
    code, _, err = run(capsys, "score", "grounding", file, answers)
    assert code == 2 and "there is no task or suite 'grounding'; they are temporal_grounding, " in err
    code, _, err = run(capsys, "score", "video_quality", file, answers)
    assert code == 1 and "holds no usable row of video_quality" in err
    code, _, err = run(capsys, "score", "temporal_grounding", file)
    assert code == 2 and "the following arguments are required: ANSWERS.jsonl" in err
    code, _, err = run(capsys, "score", "temporal_grounding", file, answers, "--task.recipe=papr")
    assert code == 2 and "task.recipe" in err


def test_it_loads_no_torch(tmp_path: Path):
    file, answers = written(tmp_path / "rows.jsonl", *ROWS), written(tmp_path / "answers.jsonl", said("a", "x"))
    code = (
        "import sys; from vcr1_fast.commands.score import score_command; "
        f"score_command('temporal_grounding', [{str(file)!r}], {str(answers)!r}, []); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
