"""`python -m bench head_memory`: GB that the head and the policy loss take in an update of 7B, with the fused head and
with plain torch, which holds the logits of all tokens. Counted on fake GPUs; nothing is timed and no GPU is needed.

Plain torch is this repository's own definition (`model.kernels: off`), not another trainer's head: those that work in
chunks lie between the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.columns import cell_heads, cell_table
from bench.plots import drawing
from vcr1_fast.fake_gpu.process import Case
from vcr1_fast.fake_gpu.process import run as run_cases
from vcr1_fast.fake_gpu.sizes import with_blocks
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config

CONFIG = Path(__file__).parents[1] / "configs" / "qwen2_5_vl_7b_cotraining_8xh100.yaml"
CLIP = (2, 8, 12)  # frame pairs, rows and columns of patches: the head does not see it
NUM_ANSWERS, LENGTHS, NUM_GPUS = 8, (64, 128, 256, 512, 1024), 8
WAYS = {"auto": "fused head", "off": "plain torch"}
CELLS = {"tokens": ("scored, in one row", "{tokens:,}")} | {
    f"{title}, GB": ("most that head and loss take", f"{{{way}:,}}") for way, title in WAYS.items()
}
COLUMN_HEADS = cell_heads(CELLS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a figure goes."""
    parser.add_argument("--figure", type=Path, help="file of a figure, .svg or .png; needs matplotlib")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each number of scored tokens: GB of each way."""
    model = with_blocks(whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"]), 1, 1, 1)
    cases = [
        Case(f"{kernels} {length}", NUM_GPUS, str(CONFIG), model, (((CLIP, (length,) * NUM_ANSWERS),),), overrides=(
            f"--model.kernels={kernels}", "--train.prompts_per_step=8",
        ))
        for length in LENGTHS
        for kernels in WAYS
    ]  # fmt: skip
    found = {report["name"]: report for report in run_cases(cases)}
    rows = [
        {"tokens": NUM_ANSWERS * length, **{way: _head_gb(found[f"{way} {length}"]) for way in WAYS}}
        for length in LENGTHS
    ]
    Console(width=100).print(cell_table("head and loss of 7B, counted", CELLS, rows, CELLS))
    if arguments.figure:
        _draw(rows, arguments.figure)
    return {"rows": rows}


def _head_gb(report: dict[str, Any]) -> float:
    if "error" in report:
        raise RuntimeError(report["traceback"])
    return round(max(kinds.get("head", 0) for kinds in report["updates"][0]["peaks"].values()) / 1e9, 2)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    with drawing(path, (6.4, 3.2)) as (_, [[axes]]):
        for way, title in WAYS.items():
            axes.plot([row["tokens"] for row in rows], [row[way] for row in rows], marker="o", label=title)
        axes.set(xlabel="scored tokens of a row", ylabel="GB", title="Head and policy loss, Qwen2.5-VL-7B, counted")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
