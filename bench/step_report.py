"""The tables of `python -m bench step`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

RATIO = "time_ratio_original"
RATIOS = ("time_ratio", "share_of_token_ratio")

COLUMN_HEADS = {
    "way": "see step_ways.py",
    "rows, ckpt": "rows of a micro-batch, and whether activations are checkpointed",
    "ms": "median of an update: forward, backward and optimizer",
    "quartiles": "of that",
    "x original": "times faster than the original's way",
    "share o.": "of the ratio of tokens to that way, forward and backward alone: 1 where all time is spent per token",
    "x plain": "times faster than separate rows with the head on answers only",
    "share p.": "of the ratio of tokens to these",
    "tokens x": "fewer tokens than those run through the model",
    "compl./s": "completions a second",
    "tok/s exec.": "tokens run through the model a second",
    "tok/s unsh.": "tokens of the G separate rows a second",
    "TFLOP/s": "forward and backward, nothing recomputed counted",
    "MFU %": "of the rate of a large matrix product measured in this run",
    "peak GiB": "most memory allocated; none is measured on a CPU",
    "gradient": "distance from the plain way's, relative",
}


def print_step_report(result: dict[str, Any]) -> None:
    console = Console(width=200)
    limits = result["limits"]
    console.print(
        f"{result['model']} in {result['dtype']}; MFU is of the {limits['gemm_tflop_s']:.3g} TFLOP/s measured here on "
        f"a {limits['dtype']} product of {limits['gemm_size']}"
    )
    errors = " · ".join(f"{name} {value:.1e}" for name, value in result["check"]["gradient_errors"].items())
    console.print(f"gradient error against a plain update in higher precision, {result['check']['size']}: {errors}")
    for size, rows in groupby(result["rows"], key=lambda row: row["size"]):
        listed = list(rows)
        console.print(main_table(size, listed))
        console.print(parts_table(size, listed))
    for row in result["absent"]:
        console.print(f"could not run: {row['way']} at {row['size']}: {row['reason']}")
    for line in result["left_out"]:
        console.print(f"left out: {line}")
    for line in result["disagreements"]:
        console.print(f"DISAGREES: {line}")
    if result["warning"]:
        console.print(result["warning"])
    gains = [f"{r['time_ratio_original']:.2f}" for r in result["rows"] if r["way"] == "kernels" and RATIO in r]
    console.print(f"step: kernels over original {', '.join(gains) or 'not measured'}; {disagreeing(result)}")


def disagreeing(result: dict[str, Any]) -> str:
    number = len(result["disagreements"])
    if number:
        return f"{number} gradients out of bounds"
    return "all gradients agree" if result["rows"] else "nothing was timed"


def main_table(size: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"one update, {size}")
    for column in COLUMN_HEADS:
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        peak = row["peak_bytes"]
        table.add_row(
            row["way"],
            f"{row['rows_per_microbatch']}, {'on' if row['gradient_checkpointing'] else 'off'}",
            f"{row['median_ms']:.4g}",
            f"{row['low_ms']:.4g}-{row['high_ms']:.4g}",
            *(_ratio(row, f"{what}_{way}") for way in ("original", "plain") for what in RATIOS),
            _ratio(row, "token_ratio_plain"),
            f"{row['completions_per_s']:.3g}",
            f"{row['tokens_per_s_executed']:.0f}",
            f"{row['tokens_per_s_unshared']:.0f}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['mfu_percent']:.0f}",
            "" if peak is None else f"{peak / 2**30:.1f}",
            f"{row['gradient_difference']:.1e}",
        )
    return table


def parts_table(size: str, rows: list[dict[str, Any]]) -> Table:
    """Measured ms of each part, and in brackets what its FLOPs would take at the measured GEMM rate."""
    parts = list(rows[0]["parts_ms"])
    table = Table(title=f"where the time goes, {size}: ms (by FLOPs)")
    table.add_column("way")
    for part in parts:
        table.add_column(part, justify="right")
    for row in rows:
        cells = []
        for part in parts:
            predicted = row["predicted_ms"].get(part)
            cells.append(f"{row['parts_ms'][part]:.4g}" + ("" if predicted is None else f" ({predicted:.3g})"))
        table.add_row(row["way"], *cells)
    return table


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""
