"""`vcr1-fast baselines`: the published values on the public files, and answers to files and names of no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import run
from tests.judge.judge_server import judges_by_words, serving
from vcr1_fast.commands.baselines import measure_baselines
from vcr1_fast.settings.config import ConfigError

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def public(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"no annotation file {name}")
    return str(DATA / name)


def percent(metrics: dict[str, float], decimals: int = 1) -> dict[str, float]:
    return {name: round(100 * value, decimals) for name, value in metrics.items()}


def test_charades_gives_the_published_baselines(capsys):
    code, out, err = run(capsys, "baselines", "temporal_grounding", public("charades_test.json"))
    lines = out.splitlines()
    result = json.loads(lines[-1])
    assert (code, err, result["num_examples"]) == (0, "", 3720)
    assert percent(result["baselines"]["whole_video"]) == {"miou": 27.0, "r@0.3": 34.3, "r@0.5": 0.4, "r@0.7": 0.0}
    assert result["best_constant_frac"] == [0.0, 0.45]
    best = {"miou": 30.5, "r@0.3": 48.8, "r@0.5": 27.7, "r@0.7": 11.9}
    assert percent(result["baselines"]["best_constant"]) == best
    assert lines[0].startswith(
        "charades_test.json (schema charades): 3,720 rows, 3,720 examples; kept as they are: 562 ending"
    )
    assert any("best_constant [0, 0.45]" in line for line in lines)
    assert any(line.split() == ["r@0.3", "34.30", "48.79"] for line in lines)


def test_got_gives_the_published_baselines(capsys):
    for recipe in ("paper", "fixed"):
        code, out, _ = run(
            capsys, "baselines", "object_tracking", public("got_val.json"), "--json", f"--recipe={recipe}"
        )
        assert (code, out.count("\n")) == (0, 1)
        result = json.loads(out)
        metrics = result["baselines"]["repeat_first_box"]
        assert result["num_examples"] == 180
        assert round(100 * metrics["mean_overlap_with_first"], 2) == 42.35
        rounded = percent(metrics)
        assert (rounded["r@0.5_with_first"], rounded["r@0.7_with_first"]) == (32.2, 5.6)
        assert (rounded["mean_overlap"], rounded["r@0.5"]) == (34.1, 22.2)


def test_questions_give_the_share_of_the_most_frequent_answer(capsys):
    # counted in the files: E is the answer to 691 of 3,358 questions, high quality that to 364 of 724
    for task, name, accuracy in (
        ("multiple_choice", "nextgqa_val.json", 691 / 3358),
        ("grounded_qa", "nextgqa_val.json", 691 / 3358),
        ("video_quality", "vidtab_quality_test.json", 364 / 724),
    ):
        code, out, _ = run(capsys, "baselines", task, public(name), "--json")
        result = json.loads(out)
        assert (code, result["task"]) == (0, task)
        for metrics in result["baselines"].values():
            assert metrics["acc"] == pytest.approx(accuracy)


VIDEO = {"duration": 10.0, "timestamps": [[0.0, 5.0], [6, 12], [4, 3]], "sentences": ["a", "b", "c"]}


def test_a_file_never_seen_before_by_hand(tmp_path: Path, capsys):
    file = tmp_path / "new.json"
    file.write_text(json.dumps({"v_1": VIDEO}))
    paper, _ = measure_baselines("temporal_grounding", file)
    # 0 to 10: 5 / 10; hull of 6 to 12 is 0 to 12, shared 4; a reversed truth shares nothing
    assert paper.scores["whole_video"]["miou"] == pytest.approx((0.5 + 4 / 12 + 0) / 3)
    fixed, _ = measure_baselines("temporal_grounding", file, "fixed")
    assert (paper.num_examples, fixed.num_examples) == (3, 2)
    assert fixed.scores["whole_video"]["miou"] == pytest.approx((0.5 + 0.4) / 2)  # 6 to 12 was cut to 6 to 10
    code, out, err = run(capsys, "baselines", "temporal_grounding", str(file), "--recipe", "fixed")
    assert code == 0
    assert err == f"bad annotation: {file}:v_1:3: interval 0 ends (3.0 s) before it starts (4.0 s)\n"
    assert json.loads(out.splitlines()[-1])["file"]["refused"] == {"reversed": 1}


def test_rows_of_other_tasks_are_counted_and_long_lists_of_errors_cut(tmp_path: Path, capsys):
    row = {"task": "temporal_grounding", "video": "a", "query": "q", "duration_s": 10, "intervals": [[0, 5]]}
    other = {"task": "video_quality", "video": "a", "query": "q", "answer": "good"}
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [row, other, *[row | {"video": 3}] * 12]))
    code, out, err = run(capsys, "baselines", "temporal_grounding", str(file), "--json")
    result = json.loads(out)
    assert (code, result["num_examples"], result["num_other_tasks"]) == (0, 1, 1)
    assert result["file"]["refused"] == {"invalid": 12}
    assert err.splitlines()[9:] == [
        f"bad annotation: {file}:12: video is 3, wanted text that is not empty",
        "bad annotation: 2 more",
    ]


def test_captions_are_compared_by_the_judge_of_the_settings(tmp_path: Path, capsys):
    """A judge that finds nothing in "A video.": recall 0, and no event of its own to be right about."""
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"task": "captioning", "video": "a", "events": ["A dog runs away."]}))
    with serving(judges_by_words) as server:
        tokens = ["--json", f"--judge.url={server.url}", "--judge.cache", "null", "--judge.model=strict"]
        code, out, err = run(capsys, "baselines", "captioning", str(file), *tokens)
        asked = [request["model"] for request in server.requests]
    assert (code, err) == (0, "")
    nothing = {"f1": 0.0, "recall": 0.0, "precision": 0.0, "judged": 1.0}
    assert json.loads(out)["baselines"] == {"empty": nothing, "a_video": nothing}
    assert asked == ["strict"] * 2  # which events are in it, and which of the true ones
    code, out, err = run(capsys, "baselines", "captioning", str(file), "--judge.ulr=x")
    assert (code, out) == (2, "") and "unknown setting judge.ulr on the command line: did you mean judge.url?" in err
    code, _, err = run(capsys, "baselines", "captioning", str(file), "another.json")
    assert code == 2 and "unexpected argument 'another.json'" in err


def test_a_file_without_the_task_is_an_error(tmp_path: Path, capsys):
    file = tmp_path / "other.json"
    file.write_text(json.dumps([{"task": "video_quality", "video": "a", "query": "q", "answer": "good"}]))
    with pytest.raises(ConfigError, match=r"has no usable row of the task temporal_grounding$"):
        measure_baselines("temporal_grounding", file)
    file.write_text(json.dumps([{"task": "temporal_grounding", "video": "a", "query": ""}]))
    with pytest.raises(ConfigError, match=r"temporal_grounding; first error: .*query is '', wanted text"):
        measure_baselines("temporal_grounding", file)


def test_wrong_names_are_one_line(tmp_path: Path, capsys):
    code, out, err = run(capsys, "baselines", "temporal_groundin", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "there is no task 'temporal_groundin', did you mean 'temporal_grounding'?" in err
    code, out, err = run(capsys, "baselines", "temporal_grounding", str(tmp_path / "none.json"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "none.json cannot be read: No such file" in err
    assert run(capsys, "baselines", "temporal_grounding")[0] == 2
