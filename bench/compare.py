"""`python -m bench compare A.json B.json`: two results of one benchmark, point by point.

A ratio is beyond the spread where the quartiles of the two do not overlap. A point without quartiles (counts, memory,
predictions) has no spread: each difference is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.columns import heads_of, print_rows

COLUMNS = {
    "point": ("point", "what tells rows apart: size, way, ..."),
    "value": ("value", "median_*, with its quartiles, or a number that is counted"),
    "a": ("A", "in the first file"),
    "b": ("B", "in the second file"),
    "ratio": ("B / A", "above 1: larger in the second"),
    "beyond": ("beyond", "the spread: quartiles apart; of a number without quartiles, any difference"),
}
COLUMN_HEADS = heads_of(COLUMNS)
# what tells the rows of a benchmark apart; all others are results
LABELS = (
    "op", "name", "task", "side", "axis", "size", "codec", "model_size", "model", "way", "decoder", "layout", "tokens",
    "prompt_tokens", "completions", "completion_tokens", "prompt", "num_gpus", "factor", "draw",
)  # fmt: skip
TIMED = (  # quartile, median, quartile
    *((f"low_{unit}", f"median_{unit}", f"high_{unit}") for unit in ("ms", "s")),
    *((f"{part}_low_ms", f"{part}_ms", f"{part}_high_ms") for part in ("step", "update")),
)
COUNTED = (
    "peak_bytes", "peak_mb", "peak_extra_bytes", "peak_gb", "predicted_s", "tflop", "launches", "elementwise_gb",
    "tokens_per_s", "mfu", "miou",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="result of a benchmark, such as bench/results/step_cpu.json")
    parser.add_argument("b", type=Path, help="another of the same benchmark")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each value of the points that both have. Raises SystemExit where the files do not fit together."""
    a, b = read(arguments.a), read(arguments.b)
    if a["benchmark"] != b["benchmark"]:
        raise SystemExit(
            f"bench compare: {arguments.a} is of `{a['benchmark']}` and {arguments.b} of `{b['benchmark']}`, "
            "wanted two of one benchmark"
        )
    points = [points_of(result) for result in (a, b)]
    common = [key for key in points[0] if key in points[1]]
    rows = [row for key in common for row in compared(key, points[0][key], points[1][key])]
    if not rows:
        raise SystemExit(
            f"bench compare: no point is in both files: {arguments.a} has {len(points[0])}, {arguments.b} "
            f"{len(points[1])}; were they run with other options?"
        )
    machines = [result["machine"] for result in (a, b)]
    console = Console(width=150, markup=False)
    for letter, machine in zip("AB", machines, strict=True):
        console.print(f"{letter}: commit {machine['commit']}, {machine['processor']}, torch {machine['torch']}")
    if any(machines[0].get(key) != machines[1].get(key) for key in ("device", "processor", "cores")):
        console.print("the machines differ: ratios of times say nothing about the code")
    print_rows(rows, COLUMNS, f"bench {a['benchmark']}: {sum(row['beyond'] for row in rows)} of {len(rows)} beyond")
    only = {letter: len(found) - len(common) for letter, found in zip("AB", points, strict=True)}
    for letter, count in only.items():
        if count:
            console.print(f"only in {letter}: {count} points")
    return {"compared": a["benchmark"], "commits": [m["commit"] for m in machines], "rows": rows, "only_in": only}


def read(path: Path) -> dict[str, Any]:
    """Raises SystemExit for what is no result of `python -m bench`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench compare: cannot read {path}: {error}") from None
    if not isinstance(result, dict) or not {"benchmark", "machine", "rows"} <= result.keys():
        raise SystemExit(f"bench compare: {path} is no result of a benchmark, wanted a file that --output wrote")
    return result


def points_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by their labels; of two alike the last counts."""
    return {" ".join(str(row[label]) for label in LABELS if label in row): row for row in result["rows"]}


def compared(point: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Medians with their quartiles, then what was counted."""
    for names in TIMED:
        if all(name in row for name in names for row in (a, b)):
            (low_a, value_a, high_a), (low_b, value_b, high_b) = ([row[name] for name in names] for row in (a, b))
            yield _row(point, names[1], value_a, value_b, low_b > high_a or low_a > high_b)
    for name in COUNTED:
        if isinstance(a.get(name), int | float) and isinstance(b.get(name), int | float):
            yield _row(point, name, a[name], b[name], a[name] != b[name])


def _row(point: str, value: str, a: float, b: float, is_beyond: bool) -> dict[str, Any]:
    return {"point": point, "value": value, "a": a, "b": b, "ratio": b / a if a else None, "beyond": is_beyond}
