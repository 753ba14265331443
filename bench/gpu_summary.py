"""`python -m bench.gpu_summary OUT STAGES`: the short table at the end of gpu_check.sh, and OUT/gpu_check.json.

STAGES is a file of lines `name, result, seconds, detail` separated by tabs. Every bar is stated with what was measured;
on a CPU, and for what was not measured, a bar has no verdict.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
OURS = "vcr1"


@dataclass(frozen=True)
class Bar:
    """One promise: measured value, bound, and whether it holds (None: not measured on a GPU)."""

    what: str
    measured: float | None
    bound: str
    holds: bool | None


def newest(folder: Path, pattern: str) -> Row:
    """Of the results `PATTERN.json`; {} where there is none."""
    found = sorted(folder.glob(f"{pattern}.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else {}


def at_least(what: str, value: float | None, bound: float, *, is_gpu: bool, is_most: bool = False) -> Bar:
    """`is_most`: at most. NaN does not hold."""
    holds = (value <= bound if is_most else value >= bound) if is_gpu and value is not None else None
    return Bar(what, value, f"{'<=' if is_most else '>='} {bound:g}", holds)


at_most = partial(at_least, is_most=True)


def pick(rows: Iterable[Row], op: str, way: str, fits: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    return [row for row in rows if row["op"] == op and row["way"].startswith(way) and fits(row)]


def fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: row["median_ms"], default=None)


def kernel_bars(result: Row) -> list[Bar]:
    rows, is_gpu = result.get("rows", []), bool(result.get("is_gpu"))
    bars = head_bars(rows, is_gpu)
    for op, bound in (("logits, forward", 85.0), ("logits, forward and backward", 80.0)):
        ours = pick(rows, op, OURS)
        worst = min((row["percent_of_floor"] for row in ours), default=None)
        bars.append(at_least(f"{op}: % of the byte floor", worst, bound, is_gpu=is_gpu))
    op = "prefix attention, forward and backward"
    for size in dict.fromkeys(row["size"] for row in rows if row["op"] == op):
        ours = fastest([row for row in pick(rows, op, OURS) if row["size"] == size])
        other = fastest([row for row in pick(rows, op, "two calls") if row["size"] == size])
        ratio = other["median_ms"] / ours["median_ms"] if ours and other else None
        way = ours["way"] if ours else OURS
        bars.append(at_least(f"prefix attention {size}, {way}: x repeated K/V", ratio, 1.5, is_gpu=is_gpu))
    return bars


def head_bars(rows: list[Row], is_gpu: bool) -> list[Bar]:
    """The policy-loss head at T >= 8k against the floor and TRL, and its worst errors."""
    op, bars = "head, forward and backward", []
    ours = pick(rows, op, "vcr1 policy loss", lambda row: not is_gpu or row["tokens"] >= 8192)
    for row in ours:
        bars.append(at_least(f"head {row['size']}: % of 3 products", row["percent_of_floor"], 85.0, is_gpu=is_gpu))
        trl = next((r for r in pick(rows, op, "TRL") if r["size"] == row["size"]), None)
        ratio = trl["median_ms"] / row["median_ms"] if trl else None
        bars.append(at_least(f"head {row['size']}: x TRL", ratio, 1.3, is_gpu=is_gpu))
        peak = row["peak_extra_bytes"]
        memory = None if peak is None else peak / row["expected_extra_bytes"]  # a tenth more for rounded-up blocks
        bars.append(at_most(f"head {row['size']}: memory / (chunk + dW + dX)", memory, 1.1, is_gpu=is_gpu))
    all_ours = pick(rows, op, OURS)
    for error, bound in (("grad_hidden_relative", 4e-3), ("grad_weight_relative", 4e-3), ("logprob_max_abs", 1e-4)):
        values = [row["errors"][error] for row in all_ours if error in row["errors"]]
        worst = (math.nan if any(math.isnan(v) for v in values) else max(values)) if values else None
        bars.append(at_most(f"head, worst {error}", worst, bound, is_gpu=is_gpu))
    return bars


def step_bars(result: Row) -> list[Bar]:
    is_gpu, bars = bool(result.get("is_gpu")), []
    for row in result.get("rows", []):
        if row["way"] != "kernels":
            continue
        if is_gpu:
            bound = 5.0 if row["prompt_tokens"] < 8192 else 6.0
            bars.append(at_least(f"step {row['size']}: x original", row.get("time_ratio_original"), bound, is_gpu=True))
        else:
            share = row.get("share_of_token_ratio_plain")
            bars.append(Bar(f"step {row['size']}: share of the token ratio", share, ">= 0.8", None))
    return bars


def decode_bars(result: Row) -> list[Bar]:
    """NVDEC against the kinder of qwen-vl-utils' processors, and what crosses to the GPU."""
    rows, is_gpu = result.get("rows", []), bool(result.get("is_gpu"))
    theirs, ours = "qwen-vl-utils, batched", "ours, dali"
    bars = []
    for size in dict.fromkeys(row["size"] for row in rows):
        gain = next((row["speedup_batched"] for row in rows if row["way"] == ours and row["size"] == size), None)
        bars.append(at_least(f"decode {size}, dali: x {theirs}", gain, 2.0, is_gpu=is_gpu))
    sent = {row["way"]: row["gpu_bytes"] for row in rows}
    fewer = sent[theirs] / sent["ours, pyav"] if {theirs, "ours, pyav"} <= sent.keys() else None
    return [*bars, at_least("decode, bytes to the GPU: x fewer", fewer, 4.0, is_gpu=is_gpu)] if rows else []


def read_stages(path: Path) -> list[dict[str, str]]:
    """The detail is some program's last line: any bytes but a line feed. splitlines() would split at others, too."""
    names = ("name", "result", "seconds", "detail")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    return [dict(zip(names, line.split("\t", 3), strict=True)) for line in lines if line]


def print_tables(stages: list[dict[str, str]], bars: list[Bar], left_out: list[str]) -> None:
    console = Console(width=118, markup=False, emoji=False)  # a stage's last line may hold brackets
    table = Table(title="gpu_check: stages")
    for column in ("stage", "result", "s", "last line"):
        table.add_column(column, overflow="fold")
    for stage in stages:
        table.add_row(stage["name"], stage["result"], stage["seconds"], stage["detail"][:70])
    console.print(table)
    table = Table(title="gpu_check: bars")
    for column in ("what", "measured", "bar", "holds"):
        table.add_column(column)
    for bar in bars:
        verdict = {True: "yes", False: "NO", None: "-"}[bar.holds]
        table.add_row(bar.what, "not measured" if bar.measured is None else f"{bar.measured:.3g}", bar.bound, verdict)
    console.print(table)
    for line in left_out:
        console.print(f"left out: {line}")


def main() -> None:
    folder, stages = Path(sys.argv[1]), read_stages(Path(sys.argv[2]))
    kernels, step, decode = (newest(folder, f"{name}_*") for name in ("kernels", "step", "decode"))
    bars = kernel_bars(kernels) + step_bars(step) + decode_bars(decode)
    left_out = [line for result in (kernels, step, decode) for line in result.get("left_out", [])]
    print_tables(stages, bars, left_out)
    summary = {
        "machine": kernels.get("machine") or step.get("machine"),
        "stages": stages,
        "bars": [asdict(bar) for bar in bars],
        "left_out": left_out,
    }
    (folder / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
