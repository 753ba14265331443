"""The tables of `python -m bench kernels`."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.columns import cell_heads, cell_table
from bench.harness import print_findings

CELLS = {
    "size": ("of the problem: model, T tokens, P prompt tokens, R tokens of each of G answers", "{size}"),
    "way": ("whose kernel", "{way}"),
    "ms": ("median", "{median_ms:.3g}"),
    "quartiles": ("of that", "{low_ms:.3g} - {high_ms:.3g}"),
    "floor ms": ("least time by the rates measured in this run, for what the title names", "{floor_ms:.3g}"),
    "% of floor": ("100 at the floor, 50 at twice its time", "{percent_of_floor:.0f}"),
    "extra MiB": (
        "most memory beyond the inputs; none is measured on a CPU",
        lambda row: "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}",
    ),
    "largest error": (
        "against the reference: the worst relative one, and the worst absolute one",
        lambda row: largest_error(row["errors"]),
    ),
}
COLUMN_HEADS = cell_heads(CELLS)


def print_report(result: dict[str, Any]) -> None:
    console = Console(width=150)
    limits = result["limits"]
    console.print(
        f"measured limits: copy {limits['copy_gb_s']:.0f} GB/s, {limits['dtype']} product of {limits['gemm_size']} "
        f"{limits['gemm_tflop_s']:.3g} TFLOP/s"
    )
    for op, rows in groupby(sorted(result["rows"], key=lambda row: row["op"]), key=lambda row: row["op"]):
        console.print(op_table(op, list(rows)))
    if result["absent"]:
        table = Table(title="could not run")
        for column in ("op", "size", "way", "reason"):
            table.add_column(column, overflow="fold")
        for row in result["absent"]:
            table.add_row(row["op"], row["size"], row["name"], row["reason"])
        console.print(table)
    print_findings(console, result)
    if result["warning"]:
        console.print(result["warning"])
    counts = (len(result["rows"]), len(result["absent"]), len(result["left_out"]))
    console.print("kernels: {} rows, {} that could not run, {} points left out".format(*counts))


def op_table(op: str, rows: list[dict[str, Any]]) -> Table:
    """Rows of one op, sizes in the order measured, ways from fast to slow."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    rows = sorted(rows, key=lambda row: (sizes.index(row["size"]), row["median_ms"]))
    return cell_table(f"{op} (floor: {rows[0]['floor']})", CELLS, rows, ("size", "way", "largest error"))


def largest_error(errors: dict[str, float]) -> str:
    """The worst relative error and the worst absolute one; NaN counts as worst."""
    parts = []
    for suffix in ("_relative", "_max_abs"):
        chosen = {name: value for name, value in errors.items() if name.endswith(suffix)}
        if chosen:
            worst = max(chosen, key=lambda name: math.inf if math.isnan(chosen[name]) else chosen[name])
            parts.append(f"{worst.removesuffix(suffix)} {chosen[worst]:.1e}{' abs' if suffix == '_max_abs' else ''}")
    return ", ".join(parts) or "not compared"
