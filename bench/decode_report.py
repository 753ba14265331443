"""The tables of `python -m bench decode`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMN_HEADS = {
    "way": "reader, with the cache or the workers",
    "clips/s": "by the median",
    "ms a clip": "median, file in the page cache, to float32 patches on the device",
    "quartiles": "of that",
    "CPU s": "of a clip, all threads and processes",
    "MB to GPU": "that cross to the device",
    "x per frame": "times faster than qwen-vl-utils' way with the processor that takes frame by frame",
    "x batched": "the same with the processor that takes all frames at once",
    "% of floor": "of the speed at which the floor that the title names would go",
    "levels": "mean distance from PyAV's patches, of 255",
}


def print_decode_report(result: dict[str, Any]) -> None:
    console = Console(width=150)
    for _, rows in groupby(result["rows"], key=lambda row: row["size"]):
        console.print(point_table(list(rows)))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["absent"]:
        reasons.setdefault((row["way"], row["reason"]), []).append(row["size"])
    for (way, reason), sizes in reasons.items():
        console.print(f"absent: {way} ({len(sizes)} points, first {sizes[0]}): {reason}", markup=False)
    for line in result["left_out"]:
        console.print(f"left out: {line}")
    for line in result["disagreements"]:
        console.print(f"DISAGREES: {line}")
    console.print(last_line(result))


def point_table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    mbit_s = first["file_bytes"] * 8 / first["length_s"] / 1e6
    floors = {row["floor"]: row["floor_ms"] for row in rows if row["floor"]}
    title = (
        f"{first['size']}: {mbit_s:.1f} Mbit/s, {first['num_frames']} frames of {first['model_size']} to the model; "
    )
    table = Table(title=title + "floors: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in floors.items()))
    for column in COLUMN_HEADS:
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["way"], f"{row['clips_per_s']:.3g}", f"{row['median_ms']:.4g}",
            f"{row['low_ms']:.4g}-{row['high_ms']:.4g}", f"{row['cpu_s']:.3g}", f"{row['gpu_bytes'] / 1e6:.1f}",
            *(number(row[key], form) for key, form in (
                ("speedup_per_frame", ".2f"), ("speedup_batched", ".2f"), ("percent_of_floor", ".0f"))),
            f"{row['mean_levels']:.2f}",
        )  # fmt: skip
    return table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


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
