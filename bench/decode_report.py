"""The tables of `python -m bench decode`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.columns import cell_heads, cell_table
from bench.harness import print_findings

CELLS = {
    "way": ("reader, with the cache or the workers", "{way}"),
    "clips/s": ("by the median", "{clips_per_s:.3g}"),
    "ms a clip": ("median, file in the page cache, to float32 patches on the device", "{median_ms:.4g}"),
    "quartiles": ("of that", "{low_ms:.4g}-{high_ms:.4g}"),
    "CPU s": ("of a clip, all threads and processes", "{cpu_s:.3g}"),
    "MB to GPU": ("that cross to the device", lambda row: f"{row['gpu_bytes'] / 1e6:.1f}"),
    "x per frame": (
        "times faster than qwen-vl-utils' way with the processor that takes frame by frame",
        "{speedup_per_frame:.2f}",
    ),
    "x batched": ("the same with the processor that takes all frames at once", "{speedup_batched:.2f}"),
    "% of floor": (
        "of the speed at which the floor that the title names would go",
        "{percent_of_floor:.0f}",
    ),
    "levels": ("mean distance from PyAV's patches, of 255", "{mean_levels:.2f}"),
}
COLUMN_HEADS = cell_heads(CELLS)


def print_decode_report(result: dict[str, Any]) -> None:
    console = Console(width=150)
    for _, rows in groupby(result["rows"], key=lambda row: row["size"]):
        console.print(point_table(list(rows)))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["absent"]:
        reasons.setdefault((row["way"], row["reason"]), []).append(row["size"])
    for (way, reason), sizes in reasons.items():
        console.print(f"absent: {way} ({len(sizes)} points, first {sizes[0]}): {reason}", markup=False)
    print_findings(console, result)
    console.print(last_line(result))


def point_table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    mbit_s = first["file_bytes"] * 8 / first["length_s"] / 1e6
    floors = {row["floor"]: row["floor_ms"] for row in rows if row["floor"]}
    title = (
        f"{first['size']}: {mbit_s:.1f} Mbit/s, {first['num_frames']} frames of {first['model_size']} to the model; "
    )
    return cell_table(title + "floors: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in floors.items()), CELLS, rows)


def last_line(result: dict[str, Any]) -> str:
    """One line for the summary of gpu_check.sh."""
    gains: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["way"].startswith("ours") and row["speedup_per_frame"] is not None:
            gains.setdefault(row["way"].removeprefix("ours, "), []).append(row["speedup_per_frame"])
    text = ", ".join(f"{way} {min(values):.2f} to {max(values):.2f}" for way, values in gains.items())
    number_wrong = len(result["disagreements"])
    verdict = (
        f"{number_wrong} ways out of bounds" if number_wrong else "all patches agree" if gains else "nothing compared"
    )
    return f"decode: times faster than qwen-vl-utils per frame: {text or 'not measured'}; {verdict}"
