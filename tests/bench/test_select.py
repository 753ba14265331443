"""The whole experiment on a few clips: what each draw holds, and that the summary is of the runs."""

import argparse

import pytest

from bench import select


def test_every_draw_is_trained_on_and_scored(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "BELLS", {"0.5 ± 0.2": (0.5, 0.2)})
    result = select.run(argparse.Namespace(pool=20, held_out=1, target=8, seeds=1))
    assert [row["draw"] for row in result["rows"]] == [select.RANDOM, *select.BELLS]
    assert [(one["draw"], one["seed"]) for one in result["runs"]] == [(row["draw"], 0) for row in result["rows"]]
    by_random = result["runs"][0]["miou"]
    for row, one in zip(result["rows"], result["runs"], strict=True):
        assert sum(one["drawn"].values()) == pytest.approx(100)
        of_kinds = [one["miou"][kind] for kind in select.HELD_OUT]
        assert row["miou"] == one["miou"]["all"] == pytest.approx(sum(of_kinds) / 2)
        assert row.get("gain", 0.0) == row["miou"] - by_random["all"] and row.get("gain_error") is None
    assert set(result["pool_miou"]) == {*select.KINDS, "all"}
    told = "".join(capfd.readouterr())
    assert told.count("data.train: 8 of 20 examples are trained on") == len(result["runs"])


def test_a_summary_pairs_the_seeds():
    halves = dict.fromkeys(select.KINDS, 0.5)
    runs = [
        {"draw": draw, "seed": seed, "drawn": dict.fromkeys(select.KINDS, 25.0), "miou": halves | {"all": score}}
        for draw, scores in ((select.RANDOM, (0.5, 0.75)), ("0.5 ± 0.2", (0.75, 0.75)))
        for seed, score in enumerate(scores)
    ]
    row = select.summary("0.5 ± 0.2", runs)
    assert (row["miou"], row["low"], row["high"], row["gain"]) == (0.75, 0.75, 0.75, 0.125)
    assert row["gain_error"] == pytest.approx(0.125)  # 0.25 and 0: standard deviation 0.177 over the root of 2
    assert row["easy"] == 25.0 and row["middling_miou"] == 0.5
    assert "gain" not in select.summary(select.RANDOM, runs)
