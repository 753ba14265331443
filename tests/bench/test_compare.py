"""`bench compare`, and that every benchmark explains its columns."""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest

from bench import compare
from bench.__main__ import BENCHMARKS
from bench.columns import explain

STORED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
MACHINE = {"device": "cpu", "processor": "P", "cores": 2, "commit": "abc", "torch": "2"}


def write(path: Path, benchmark: str, *rows: dict) -> Path:
    path.write_text(json.dumps({"benchmark": benchmark, "machine": MACHINE, "rows": rows}), encoding="utf-8")
    return path


def timed(size: str, low: float, median: float, high: float, **more) -> dict:
    return {"size": size, "way": "ours", "low_ms": low, "median_ms": median, "high_ms": high, **more}


def test_ratios_and_what_is_beyond_the_spread(tmp_path: Path, capsys):
    a = write(
        tmp_path / "a.json", "step", timed("s", 9, 10, 11), timed("m", 9, 10, 11, peak_bytes=4), timed("gone", 1, 1, 1)
    )
    b = write(tmp_path / "b.json", "step", timed("s", 10, 12, 14), timed("m", 12, 20, 21, peak_bytes=2))
    result = compare.run(argparse.Namespace(a=a, b=b))
    found = [(row["point"], row["value"], row["ratio"], row["beyond"]) for row in result["rows"]]
    assert found == [
        ("s ours", "median_ms", 1.2, False), ("m ours", "median_ms", 2.0, True), ("m ours", "peak_bytes", 0.5, True),
    ]  # fmt: skip
    assert result["commits"] == ["abc", "abc"] and result["only_in"] == {"A": 1, "B": 0}
    assert "only in A: 1 points" in capsys.readouterr().out


def test_files_that_do_not_fit_together(tmp_path: Path):
    step = write(tmp_path / "step.json", "step", timed("s", 1, 2, 3))
    other = write(tmp_path / "other.json", "rewards", timed("s", 1, 2, 3))
    elsewhere = write(tmp_path / "elsewhere.json", "step", timed("t", 1, 2, 3))
    (tmp_path / "none.json").write_text("{}", encoding="utf-8")
    for file, message in (
        (other, "is of `step` and .* of `rewards`"),
        (elsewhere, "no point is in both"),
        (tmp_path / "none.json", "no result of a benchmark"),
        (tmp_path / "missing.json", "cannot read"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare.run(argparse.Namespace(a=step, b=file))


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_the_stored_results_compare_with_themselves(stored: Path):
    """Point by point: what tells rows apart is known of every benchmark, and each has something to compare."""
    rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
    result = compare.run(argparse.Namespace(a=stored, b=stored))
    assert len({row["point"] for row in result["rows"]}) == len(rows)
    assert {row["b"] / row["a"] for row in result["rows"] if row["a"]} == {1.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_column_is_explained(name: str):
    benchmark = importlib.import_module(f"bench.{name}")
    text = explain(benchmark.COLUMN_HEADS)
    assert text.count("\n") == len(benchmark.COLUMN_HEADS)
    assert all(re.search(rf"^  {re.escape(head)} +\S", text, re.M) for head in benchmark.COLUMN_HEADS)
