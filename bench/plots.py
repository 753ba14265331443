"""Plots of the benchmarks, where matplotlib can be imported; without it there are none and the run goes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEAD_OP = "head, forward and backward"


@contextmanager
def drawing(path: Path, inches: tuple[float, float], panels: tuple[int, int] = (1, 1)) -> Iterator[tuple[Any, Any]]:
    """(figure, [rows][columns] of axes) of a file, .svg or .png, that is written at the end.

    The same numbers give the same file. Text of an .svg stays text, which keeps it small.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(*panels, figsize=inches, layout="constrained", squeeze=False)
        yield figure, axes
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def plot_kernels(result: dict[str, Any], folder: Path) -> list[str]:
    """Time and memory of the head over T, one figure per model. Returns the names of the files written."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["op"] == HEAD_OP]
    return [_plot_head(rows, model, folder, result["is_gpu"]) for model in dict.fromkeys(row["model"] for row in rows)]


def _plot_head(rows: list[dict[str, Any]], model: str, folder: Path, is_gpu: bool) -> str:
    chosen = sorted((row for row in rows if row["model"] == model), key=lambda row: row["tokens"])
    panels = [("median_ms", 1.0, "ms")]
    if all(row["peak_extra_bytes"] is not None for row in chosen):  # a CPU run measures no memory
        panels.append(("peak_extra_bytes", 2.0**-30, "GiB beyond the inputs"))
    sizes, name = sorted({row["tokens"] for row in chosen}), f"kernels_head_{model}.png"
    with drawing(folder / name, (6 * len(panels), 5), (1, len(panels))) as (figure, [line]):
        for axes, (field, scale, label) in zip(line, panels, strict=True):
            for way in dict.fromkeys(row["way"] for row in chosen):
                points = [row for row in chosen if row["way"] == way]
                style = {"marker": "o", "linewidth": 2.5 if way.startswith("vcr1") else 1.2}
                axes.plot([row["tokens"] for row in points], [row[field] * scale for row in points], label=way, **style)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        floors = {row["tokens"]: row["floor_ms"] for row in chosen}
        line[0].plot(floors.keys(), floors.values(), "k--x", label="3 matrix products, measured")
        figure.legend(*line[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
        device = "" if is_gpu else "\non a CPU: means nothing for a GPU"
        figure.suptitle(f"head and GRPO loss, forward and backward, {model}{device}")
    return name
