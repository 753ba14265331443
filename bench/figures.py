"""`python -m bench figures`: figures of docs/images and tables of docs/performance.md, from what `--output` wrote into
bench/results.

    roofline.svg       each kernel of an update by its operations a byte, from predict_*.json; of a GPU's kernels_*.json
                       the measured ones. Which is which is in the legend
    update_split.svg   an update's seconds by part, predict_before.json above predict_*.json
    scaling.svg        time and memory against frames, answers and their length, from scaling_*.json

A figure whose result is not there is left out by name. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import doc_tables
from bench.gpu_summary import newest
from bench.plots import drawing
from bench.update_meter import PARTS, PEAK_FLOP_S, ROOT

MEMORY_BYTES_S = 3.35e12  # of an H100's data sheet, as PEAK_FLOP_S is
SHOWN_CASE = "group_3k8_7b_8"
SPLIT_CASES = {"group_3k8_7b_8": "prompt of 3.8k", "group_16k6_7b_8": "prompt of 16.6k"}
NUM_NAMED, SHOWN_S, MARKERS = 14, 1e-4, "od"  # kernels with a name, the least seconds of one, their markers
COLUMN_HEADS: dict[str, str] = {}  # prints no table


@dataclass(frozen=True)
class RooflinePoint:
    """One kernel: all its launches together."""

    name: str
    flop: float
    num_bytes: float
    seconds: float
    is_measured: bool

    @property
    def intensity(self) -> float:
        return self.flop / self.num_bytes

    @property
    def tflop_s(self) -> float:
        return self.flop / self.seconds / 1e12

    @property
    def floor_s(self) -> float:
        """The least time that an H100's data sheet allows."""
        return max(self.flop / PEAK_FLOP_S, self.num_bytes / MEMORY_BYTES_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images", help="where the figures go")
    parser.add_argument("--page", type=Path, default=doc_tables.PAGE, help="page whose tables are written")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws what it has results for; their files' names."""
    results, folder = arguments.results, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    before, after, scaling = (newest(results, name) for name in ("predict_before", "predict_[!b]*", "scaling_*"))
    drawn, missing = [], []
    for name, needed, draw in (
        ("roofline.svg", after, lambda path: draw_roofline(path, [*predicted(after), *measured(results)])),
        ("update_split.svg", before and after, lambda path: draw_split(path, {"before": before, "after": after})),
        ("scaling.svg", scaling, lambda path: draw_scaling(path, scaling)),
    ):
        if needed:
            draw(folder / name)
        (drawn if needed else missing).append(name)
    others = {name: newest(results, f"{name}_*") for name in ("select", "rollouts")}
    tables = doc_tables.sections_of({"predict": after, "scaling": scaling, **others})
    doc_tables.write(arguments.page, tables)
    print(f"drawn: {', '.join(drawn) or 'nothing'}; without a result: {', '.join(missing) or 'none'}")
    return {"drawn": drawn, "missing": missing, "tables": list(tables)}


def predicted(result: Mapping[str, Any]) -> list[RooflinePoint]:
    """The kernels of an update; those of which neither operations nor bytes were counted are left out."""
    [row] = [row for row in result["rows"] if row["name"] == SHOWN_CASE]
    return [
        RooflinePoint(name, kernel["flop"], kernel["num_bytes"], kernel["seconds"], False)
        for name, kernel in row["kernels"].items()
        if min(kernel["flop"], kernel["num_bytes"], kernel["seconds"]) > 0
    ]


def measured(folder: Path) -> list[RooflinePoint]:
    """Our kernels in the results of `bench kernels` on a GPU."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("kernels_*.json"))]
    return [
        RooflinePoint(f"{row['op']}, {row['size']}", row["flop"], row["num_bytes"], row["median_ms"] / 1e3, True)
        for result in results
        if result["is_gpu"]
        for row in result["rows"]
        if row["way"].startswith("vcr1")
    ]


def draw_roofline(path: Path, points: list[RooflinePoint]) -> None:
    """The largest by name, the others in grey. An open marker is a prediction, a full one was measured."""
    points = sorted((point for point in points if point.seconds >= SHOWN_S), key=lambda point: -point.seconds)
    with drawing(path, (10.0, 5.2)) as (figure, [[axes]]):
        ridge = PEAK_FLOP_S / MEMORY_BYTES_S
        roof = [min(point.intensity for point in points), ridge, max(4 * ridge, *(p.intensity for p in points))]
        heights = [min(x * MEMORY_BYTES_S, PEAK_FLOP_S) / 1e12 for x in roof]
        axes.plot(roof, heights, "k-", label="floor: an H100's 3.35 TB/s and 989 TFLOP/s")
        for rank, point in enumerate(points):
            share = 100 * point.floor_s / point.seconds
            color = f"C{rank % 10}" if rank < NUM_NAMED else "0.7"
            axes.plot(
                point.intensity,
                point.tflop_s,
                MARKERS[rank // 10] if rank < NUM_NAMED else ".",
                color=color,
                markerfacecolor=color if point.is_measured else "none",
                linestyle="",
                label=f"{point.name}: {1e3 * point.seconds:,.1f} ms, {share:.0f} % of the floor"
                if rank < NUM_NAMED
                else f"others above {1e3 * SHOWN_S:g} ms"
                if rank == NUM_NAMED
                else None,
            )
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
        axes.grid(alpha=0.3)
        full = "; full: measured" if any(point.is_measured for point in points) else ""
        figure.suptitle("Kernels of an update, Qwen2.5-VL-7B, prompt of 3.8k, 8 answers, 8 H100", fontsize=11)
        figure.legend(
            loc="outside right center",
            title=f"open markers: PREDICTED, not measured{full}",
            fontsize=7.5,
            title_fontsize=8,
            frameon=False,
        )


def draw_split(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """One bar for each case and result; the network works at the same time and is a thin bar of its own."""
    bars = [
        (f"{title}, {when}", next(row for row in result["rows"] if row["name"] == case))
        for case, title in SPLIT_CASES.items()
        for when, result in results.items()
    ]
    with drawing(path, (9.0, 3.4)) as (figure, [[axes]]):
        left = [0.0] * len(bars)
        for part in PARTS:
            widths = [row["parts_s"][part] for _, row in bars]
            axes.barh(range(len(bars)), widths, 0.6, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        network = [row["network_s"] for _, row in bars]
        axes.barh([y + 0.38 for y in range(len(bars))], network, 0.12, color="0.4", label="network, meanwhile")
        for y, (_, row) in enumerate(bars):
            words = (
                f"  {row['predicted_s']:.2f} s, {100 * row['mfu']:.0f} % MFU ({row['recompute']}, {row['attention']})"
            )
            axes.text(left[y], y, words, va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set(xlabel="s, PREDICTED", xlim=(0, 1.35 * max(left)))
        figure.suptitle("An update of Qwen2.5-VL-7B by part: 8 answers, 8 H100, predicted", fontsize=11)
        figure.legend(loc="outside lower center", ncols=len(PARTS) + 1, fontsize=8, frameon=False)


def draw_scaling(path: Path, result: Mapping[str, Any]) -> None:
    """Time above, memory below; the exponent of each line is in its label."""
    axes_names = list(dict.fromkeys(row["axis"] for row in result["rows"]))
    values = {"median_ms": ("ms", "time"), "peak_mb": ("MB", "memory")}
    titles = {"original": "the original's way", "kernels": "ours"}
    with drawing(path, (9.0, 5.2), (len(values), len(axes_names))) as (figure, all_axes):
        for line, (key, (unit, word)) in zip(all_axes, values.items(), strict=True):
            for axes, axis in zip(line, axes_names, strict=True):
                for way, title in titles.items():
                    chosen = [row for row in result["rows"] if (row["axis"], row["way"]) == (axis, way)]
                    [fit] = [fit for fit in result["fits"] if (fit["axis"], fit["way"]) == (axis, way)]
                    label = f"{title}: {fit[f'{word}_exponent']:.2f} ± {fit[f'{word}_error']:.2f}"
                    axes.plot([row["at"] for row in chosen], [row[key] for row in chosen], "o-", label=label)
                sizes = sorted({row["at"] for row in result["rows"] if row["axis"] == axis})
                axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
                axes.set_xticks(sizes, [str(size) for size in sizes])
                axes.minorticks_off()
                axes.grid(alpha=0.3)
                axes.legend(fontsize=7, frameon=False)
        figure.suptitle("Forward and backward, tiny model, CPU, measured; numbers: exponent of growth", fontsize=11)
