"""The tables of `python -m bench step`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.columns import Cells, cell_heads, cell_table
from bench.harness import print_findings

CELLS = {
    "way": ("see step_ways.py", "{way}"),
    "rows, ckpt": (
        "rows of a micro-batch, and whether activations are checkpointed",
        lambda row: f"{row['rows_per_microbatch']}, {'on' if row['gradient_checkpointing'] else 'off'}",
    ),
    "ms": ("median of an update: forward, backward and optimizer", "{median_ms:.4g}"),
    "quartiles": ("of that", "{low_ms:.4g}-{high_ms:.4g}"),
    "x original": ("times faster than the original's way", "{time_ratio_original:.2f}"),
    "share o.": (
        "of the ratio of tokens to that way, forward and backward alone: 1 where all time is spent per token",
        "{share_of_token_ratio_original:.2f}",
    ),
    "x plain": ("times faster than separate rows with the head on answers only", "{time_ratio_plain:.2f}"),
    "share p.": ("of the ratio of tokens to these", "{share_of_token_ratio_plain:.2f}"),
    "tokens x": ("fewer tokens than those run through the model", "{token_ratio_plain:.2f}"),
    "compl./s": ("completions a second", "{completions_per_s:.3g}"),
    "tok/s exec.": ("tokens run through the model a second", "{tokens_per_s_executed:.0f}"),
    "tok/s unsh.": ("tokens of the G separate rows a second", "{tokens_per_s_unshared:.0f}"),
    "TFLOP/s": ("forward and backward, nothing recomputed counted", "{tflop_per_s:.3g}"),
    "MFU %": ("of the rate of a large matrix product measured in this run", "{mfu_percent:.0f}"),
    "peak GiB": (
        "most memory allocated; none is measured on a CPU",
        lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
    ),
    "gradient": ("distance from the plain way's, relative", "{gradient_difference:.1e}"),
}
COLUMN_HEADS = cell_heads(CELLS)


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
        console.print(cell_table(f"one update, {size}", CELLS, listed))
        console.print(parts_table(size, listed))
    for row in result["absent"]:
        console.print(f"could not run: {row['way']} at {row['size']}: {row['reason']}")
    print_findings(console, result)
    if result["warning"]:
        console.print(result["warning"])
    ratios = [row.get("time_ratio_original") for row in result["rows"] if row["way"] == "kernels"]
    gains = [f"{ratio:.2f}" for ratio in ratios if ratio is not None]
    console.print(f"step: kernels over original {', '.join(gains) or 'not measured'}; {disagreeing(result)}")


def disagreeing(result: dict[str, Any]) -> str:
    number = len(result["disagreements"])
    if number:
        return f"{number} gradients out of bounds"
    return "all gradients agree" if result["rows"] else "nothing was timed"


def parts_table(size: str, rows: list[dict[str, Any]]) -> Table:
    """Measured ms of each part, and in brackets what its FLOPs would take at the measured GEMM rate."""

    def cell(row: dict[str, Any], part: str) -> str:
        predicted = row["predicted_ms"].get(part)
        return f"{row['parts_ms'][part]:.4g}" + ("" if predicted is None else f" ({predicted:.3g})")

    parts = {part: ("", lambda row, part=part: cell(row, part)) for part in rows[0]["parts_ms"]}
    cells: Cells = {"way": ("", "{way}"), **parts}
    return cell_table(f"where the time goes, {size}: ms (by FLOPs)", cells, rows)
