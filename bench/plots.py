"""Plots of the kernel benchmark, where matplotlib can be imported; without it there are none and the run goes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

HEAD_OP = "head, forward and backward"


def plot_kernels(result: dict[str, Any], folder: Path) -> list[str]:
    """Time and memory of the head over T, one figure per model. Returns the names of the files written."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return []
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["op"] == HEAD_OP]
    return [_plot_head(rows, model, folder, result["is_gpu"]) for model in dict.fromkeys(row["model"] for row in rows)]


def _plot_head(rows: list[dict[str, Any]], model: str, folder: Path, is_gpu: bool) -> str:
    import matplotlib.pyplot as plt

    chosen = sorted((row for row in rows if row["model"] == model), key=lambda row: row["tokens"])
    panels = [("median_ms", 1.0, "ms")]
    if all(row["peak_extra_bytes"] is not None for row in chosen):  # a CPU run measures no memory
        panels.append(("peak_extra_bytes", 2.0**-30, "GiB beyond the inputs"))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False)
    sizes = sorted({row["tokens"] for row in chosen})
    for axes, (field, scale, label) in zip(all_axes[0], panels, strict=True):
        for way in dict.fromkeys(row["way"] for row in chosen):
            points = [row for row in chosen if row["way"] == way]
            style = {"marker": "o", "linewidth": 2.5 if way.startswith("vcr1") else 1.2}
            axes.plot([row["tokens"] for row in points], [row[field] * scale for row in points], label=way, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    floors = dict((row["tokens"], row["floor_ms"]) for row in chosen)
    all_axes[0][0].plot(floors.keys(), floors.values(), "k--x", label="3 matrix products, measured")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    device = "" if is_gpu else "\non a CPU: means nothing for a GPU"
    figure.suptitle(f"head and GRPO loss, forward and backward, {model}{device}")
    name = f"kernels_head_{model}.png"
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name
