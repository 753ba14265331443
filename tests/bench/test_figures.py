"""`bench scaling` and the figures and tables that are made of results."""

import argparse
import json
import math
import shutil
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from bench import doc_tables, figures, plots, scaling

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_slopes_by_hand():
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx((2.0, 0.0))
    # x, y in powers of 2: 0 1 2 over 0 2 1. b = 1/2, residuals -1/2 1 -1/2: sqrt((3/2) / 1 / 2)
    assert scaling.slope([1, 2, 4], [1, 4, 2]) == pytest.approx((0.5, math.sqrt(0.75)))
    with pytest.raises(ValueError, match="at least 3"):
        scaling.slope([1, 2], [1, 2])


def test_peak_bytes_are_those_alive_at_once():
    x = torch.ones(1000)
    with scaling.PeakBytes() as memory:
        y = x * 2  # 4,000 bytes, and a view of them
        z = y[:500] + y[500:]  # 2,000 more
        del y
        _ = z * 2  # 2,000 in place of 4,000
    assert memory.num_bytes == 6000


@pytest.fixture(scope="module")
def scaled() -> dict:
    small = {"frames": (4, 8, 16), "G": (2, 3, 4), "R": (5, 10, 20)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "AXES", small)
        patch.setattr(scaling, "BASE", scaling.StepPoint("tiny", (4, 8, 8), 30, 10, 3))
        return scaling.run(argparse.Namespace(quick=True, rounds=1))


def test_scaling_measures_both_ways_on_each_axis(scaled):
    assert len(scaled["rows"]) == 3 * 3 * 2 and len(scaled["fits"]) == 6
    assert all(row["median_ms"] > 0 and row["peak_mb"] > 0 for row in scaled["rows"])
    memory = {(fit["axis"], fit["way"]): fit["memory_exponent"] for fit in scaled["fits"]}
    # of G rows each holds the prompt: twice as many take about twice the memory, packed ones only their answers
    assert memory["G", "original"] > 0.8 > 0.6 > memory["G", "kernels"]


def split_row(name: str) -> dict:
    parts = dict.fromkeys(figures.PARTS, 0.1)
    kernels = {
        "matrix product, mm": {"launches": 1, "flop": 6.8e11, "num_bytes": 1e9, "seconds": 1e-3},
        "mul": {"launches": 1, "flop": 1e9, "num_bytes": 2.7e9, "seconds": 1e-3},
        "copy": {"launches": 1, "flop": 0.0, "num_bytes": 1e9, "seconds": 1e-3},
    }
    more = {"predicted_s": 0.6, "network_s": 0.2, "mfu": 0.4, "recompute": "full", "attention": "fa2"}
    return {"name": name, "parts_s": parts, "kernels": kernels, **more}


def test_figures_are_drawn_from_results_and_say_what_is_predicted(tmp_path: Path, scaled):
    results, folder = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    page = shutil.copy(doc_tables.PAGE, tmp_path)
    arguments = argparse.Namespace(results=results, folder=folder, page=Path(page))
    names = ["roofline.svg", "update_split.svg", "scaling.svg"]
    assert figures.run(arguments) == {"drawn": [], "missing": names, "tables": []}
    rows = [split_row(name) for name in figures.SPLIT_CASES]
    for name in ("predict_before", "predict_cpu"):
        predicted = {"rows": rows, "public": [], "errors": []}
        (results / f"{name}.json").write_text(json.dumps(predicted), encoding="utf-8")
    (results / "scaling_cpu.json").write_text(json.dumps(scaled), encoding="utf-8")
    head = {"op": "head", "size": "7B T=8192", "way": "vcr1", "flop": 1e12, "num_bytes": 1e9, "median_ms": 2.0}
    (results / "kernels_H100.json").write_text(json.dumps({"is_gpu": True, "rows": [head]}), encoding="utf-8")
    assert figures.run(arguments)["missing"] == []
    growth = doc_tables.section(arguments.page.read_text(encoding="utf-8"), "growth").splitlines()
    assert len(growth) == 2 + 6 and growth[2].startswith("| frames | original | ")
    roofline = (folder / "roofline.svg").read_text(encoding="utf-8")
    assert "PREDICTED, not measured; full: measured" in roofline and "head, 7B T=8192: 2.0 ms, 51 % of" in roofline
    assert "s, PREDICTED" in (folder / "update_split.svg").read_text(encoding="utf-8")
    [mm, mul] = figures.predicted({"rows": rows})  # of a copy no operation was counted
    assert mm.tflop_s == pytest.approx(680) and mm.floor_s == pytest.approx(6.8e11 / 989e12)
    assert mul.intensity == pytest.approx(1 / 2.7) and mul.floor_s == pytest.approx(2.7e9 / 3.35e12)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    figures.run(arguments)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}  # the same file from the same numbers


def test_the_legend_of_the_kernels_plot_is_not_over_its_title(tmp_path: Path, monkeypatch):
    def rows(way: str) -> list[dict]:
        op = {"op": plots.HEAD_OP, "model": "3B", "peak_extra_bytes": None, "floor_ms": 1.0}
        return [op | {"way": f"a rather long name of the way {way}", "tokens": t, "median_ms": 2.0} for t in (256, 512)]

    drawn = {}
    save = matplotlib.figure.Figure.savefig

    def look(self, *args, **options):
        save(self, *args, **options)
        renderer = self.canvas.get_renderer()
        drawn["title"], drawn["legend"] = (
            part.get_window_extent(renderer) for part in (self._suptitle, self.legends[0])
        )

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
    plots.plot_kernels({"rows": [row for way in "abcdefgh" for row in rows(way)], "is_gpu": False}, tmp_path)
    assert not drawn["title"].overlaps(drawn["legend"])


def test_the_tables_of_the_page_are_those_of_the_stored_results():
    """`python -m bench figures` writes them."""
    kinds = {"predict": "predict_[!b]*", "scaling": "scaling_*", "select": "select_*", "rollouts": "rollouts_*"}
    stored = {name: figures.newest(RESULTS, pattern) for name, pattern in kinds.items()}
    assert all(stored.values())
    text = doc_tables.PAGE.read_text(encoding="utf-8")
    for name, table in doc_tables.sections_of(stored).items():
        assert doc_tables.section(text, name) == table, name


def test_a_page_without_a_section_is_refused(tmp_path: Path):
    (tmp_path / "page.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no section between"):
        doc_tables.write(tmp_path / "page.md", {"step": "| a |"})
