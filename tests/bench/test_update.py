"""All ways do the same update, a wrong one is refused, and stock TRL trains without the pixels of a video."""

import argparse
from dataclasses import replace

import pytest
import torch

from bench import update
from bench.harness import Deadline, allocated_peak
from bench.update_problem import LAYOUTS, POINTS, Point, Problem
from bench.update_trl import TrlWay
from bench.update_ways import WAYS, OursWay
from vcr1_fast.learner.model import load_tokenizer

TINY = Point(num_pictures=2, prompt_len=70, completion_len=6, num_completions=3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(autouse=True)
def tiny_point(monkeypatch):
    monkeypatch.setitem(POINTS, 70, TINY)
    monkeypatch.setattr(update, "GROWTH", (2, 3, 4))


def asked(**changes):
    return argparse.Namespace(**{"points": [70], "rounds": 1, "seconds": 120.0, "no_growth": True, **changes})


def test_a_run_times_all_ways_and_they_agree():
    result = update.run(asked(no_growth=False))
    assert result["disagreements"] == [] and update.failed(result) is None
    assert [(row["way"], row["layout"]) for row in result["rows"]] == [(kind.name, kind.layout) for kind in WAYS]
    ours = {row["layout"]: row for row in result["rows"] if row["way"] == "ours"}
    for row in result["rows"]:
        assert row["gradient_error"] < 5e-5 and row["repeats"] == 1
        assert 0 < row["update_ms"] < row["step_ms"]
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / ours[row["layout"]]["step_ms"])
        assert row["peak_ratio"] == row["peak_bytes"] / ours[row["layout"]]["peak_bytes"]
        assert row["peak_bytes"] > 4e6  # the gradients alone take 4.2 MB
    assert [(row["way"], list(row["step_ms"])) for row in result["growth"]] == [
        (kind.name, ["2", "3", "4"]) for kind in WAYS
    ]
    assert [row["way"] for row in result["absent"]] == ["verl"]


@pytest.fixture
def checked(tokenizer):
    """Takes what is done to `ours` and gives the disagreements of a check of `original` and `ours`."""

    def run(change) -> list[str]:
        session = update.Session(tokenizer, 1, deadline=Deadline(60.0))
        problem = Problem(TINY, "video", tokenizer)
        runners = [update.Runner(kind, kind.open(problem)) for kind in WAYS[-2:]]
        change(runners[1].way)
        update.check(session, problem, runners)
        return session.disagreements

    return run


def test_a_way_with_a_wrong_advantage_is_refused(checked):
    def change(ours) -> None:
        right = ours.update

        def wrong(group, **options):
            first, *others = group.advantages
            return right(replace(group, advantages=(1.001 * first, *others)), **options)

        ours.update = wrong

    assert checked(lambda ours: None) == []
    [line] = checked(change)
    assert line.startswith("ours at P=70") and "gradient off by" in line
    assert update.failed({"disagreements": [line]}) == line


def test_an_answer_of_another_length_is_refused(checked):
    def change(ours) -> None:
        ours.problem = replace(ours.problem, point=replace(TINY, completion_len=5))

    [line] = checked(change)
    assert "answers of [5] tokens" in line


def test_stock_trl_trains_without_the_pixels_of_a_video(tokenizer):
    """It generates with them, and no error says so; with our patch the tower has a gradient."""
    way = TrlWay(Problem(TINY, "video", tokenizer))
    runs = []
    way.model.model.visual.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def tower_gradients() -> int:
        runs.clear()
        return sum(name.startswith("model.visual.") for name in way.step(1, wants_gradients=True).gradients)

    assert tower_gradients() == len(list(way.model.model.visual.parameters())) and runs == [False, True]
    assert way.patch is not None
    way.patch.remove()
    assert tower_gradients() == 0 and runs == [False]
    way.close()


def test_both_layouts_have_the_tokens_and_pixels_of_the_point(tokenizer):
    for point in POINTS.values():
        pictures, video = (Problem(point, layout, tokenizer).prompt() for layout in LAYOUTS)
        assert len(pictures.token_ids_L) == len(video.token_ids_L) == point.prompt_len
        assert torch.equal(pictures.media[0].values_PC, video.media[0].values_PC)
        assert int((video.token_ids_L == 7).sum()) == 16 * point.num_pictures
    with pytest.raises(ValueError, match="the prompt has 57 tokens"):
        Problem(replace(TINY, prompt_len=50), "pictures", tokenizer).prompt()


def test_peak_of_what_is_alive_at_a_time():
    kept = torch.zeros(1000)

    def call() -> None:
        first = torch.zeros(250_000)  # 1 MB
        second = first + 1  # 2 MB alive
        del first
        torch.cat([second, kept])  # 1 MB and 1.004 MB
        torch.zeros(10)

    assert 2_004_000 <= allocated_peak(call) <= 2_004_200


def test_a_step_leaves_the_weights(tokenizer):
    way = OursWay(Problem(TINY, "video", tokenizer))
    before = {name: weight.clone() for name, weight in way.learner.policy.named_parameters()}
    first, again = way.step(5), way.step(5)
    assert first.completion_ids == again.completion_ids
    for name, weight in way.learner.policy.named_parameters():
        assert torch.equal(weight, before[name]), name
