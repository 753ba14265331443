"""`python -m bench learner`: what an update of Qwen2.5-VL-7B costs each GPU, counted on fake ones; predicted seconds.

MFU is the FLOP of the update without what is recomputed (bench/flops.py), of 989 TFLOP/s in the seconds predicted.

No GPU is needed and nothing is timed: the real load and update run on tensors without values (vcr1_fast.fake_gpu) with
few blocks, and are extrapolated to the whole model, which the tests show to be right to 1 %. One group of 8 answers on
each GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from bench.flops import Grid, decoder_flop, head_flop, tower_flop
from vcr1_fast.fake_gpu import predict
from vcr1_fast.fake_gpu.extrapolate import Report, Size, peak_of, sizes_to_run, to_blocks
from vcr1_fast.fake_gpu.groups import TEXT_TOKENS
from vcr1_fast.fake_gpu.process import Case
from vcr1_fast.fake_gpu.process import run as run_cases
from vcr1_fast.fake_gpu.sizes import num_blocks, with_blocks
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.learner.recompute import RECOMPUTE

CONFIG = Path(__file__).parents[1] / "configs" / "qwen2_5_vl_7b_cotraining_8xh100.yaml"
ANSWERS = (300, 330, 360, 390, 420, 450, 480, 512)
CLIPS = {"3.8k": (10, 34, 42), "16.6k": (46, 34, 42)}  # prompt tokens: frame pairs, rows, columns of patches
WORLDS = (8, 64)
PEAK_FLOP_S = 989e12  # of an H100, dense bfloat16
COLUMNS = {
    "prompt": "P", "num_gpus": "GPUs", "load_peak_gb": "load, GB", "peak_gb": "update, GB", "tflop": "TFLOP",
    "launches": "launches", "syncs": "waits", "copies": "copies", "blocking_copies": "blocking",
    "collectives": "collectives", "collective_s": "their s", "predicted_s": "predicted s", "tokens_per_s": "tokens/s",
    "mfu": "MFU",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is recomputed, for all points."""
    parser.add_argument("--recompute", choices=RECOMPUTE, default="full", help="as model.gradient_checkpointing")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each number of GPUs and prompt length."""
    whole = whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"])
    blocks = num_blocks(whole)
    sizes = {str(size): size for size in sizes_to_run()}
    rows: list[dict[str, Any]] = []
    for num_gpus in WORLDS:
        for prompt, grid in CLIPS.items():
            updates = (((grid, ANSWERS),),) * 2  # the first makes the optimizer's moments
            options = (f"--model.gradient_checkpointing={arguments.recompute}",)
            cases = [
                Case(name, num_gpus, str(CONFIG), with_blocks(whole, *size), updates, overrides=options)
                for name, size in sizes.items()
            ]
            found = {sizes[report["name"]]: report for report in run_cases(cases)}
            counts = counts_of(found, blocks)
            rows.append({"prompt": prompt, "num_gpus": num_gpus, **counts, **_pace(whole, grid, counts["predicted_s"])})
    table = Table(*COLUMNS.values(), title="an update of 7B on each GPU; seconds are predicted, none was measured")
    for row in rows:
        table.add_row(*(f"{row[key]:,}" if isinstance(row[key], int | float) else row[key] for key in COLUMNS))
    Console(width=118).print(table)
    return {"rows": rows, "rates": vars(predict.H100_RATES), "answers": ANSWERS, "recompute": arguments.recompute}


def _pace(config: Mapping[str, Any], grid: Grid, seconds: float) -> dict[str, float]:
    """Packed tokens a second and MFU of one update that takes so long."""
    hf_config = AutoConfig.for_model(**config)
    text, prompt_len = hf_config.text_config, grid[0] * grid[1] * grid[2] // 4 + TEXT_TOKENS
    fed = [length - 1 for length in ANSWERS]
    pairs = prompt_len * (prompt_len + 1) // 2 + sum(prompt_len * f + f * (f + 1) // 2 for f in fed)
    num_tokens = prompt_len + sum(fed)
    products = decoder_flop(text, num_tokens, 0) + head_flop(text, sum(ANSWERS))
    attention = decoder_flop(text, num_tokens, pairs) - decoder_flop(text, num_tokens, 0)
    flop = 3 * (products + tower_flop(hf_config.vision_config, [grid])) + 3.5 * attention
    return {"tokens_per_s": round(num_tokens / seconds), "mfu": round(flop / (PEAK_FLOP_S * seconds), 3)}


def counts_of(reports: Mapping[Size, Mapping[str, Any]], blocks: Size) -> dict[str, Any]:
    """What one steady update of the whole model comes to."""

    def whole(part: str, index: int | None = None) -> Report:
        chosen = {size: r[part] if index is None else r[part][index] for size, r in reports.items()}
        return to_blocks(chosen, blocks)

    load, update = whole("load"), whole("updates", -1)
    return {
        "load_peak_gb": round(peak_of(load).num_bytes / 1e9, 1),
        "peak_gb": round(peak_of(update).num_bytes / 1e9, 1),
        "tflop": round((update["gemm_flop"] + update["attention_flop"]) / 1e12),
        "launches": update["launches"],
        "syncs": sum(update["syncs"].values()),
        "copies": sum(update["copies"].values()),
        "blocking_copies": sum(update["blocking_copies"].values()),
        "collectives": update["collectives"],
        "elementwise_gb": round(update["moved_bytes"] / 1e9),
        "collective_s": round(update["collective_s"], 2),
        "predicted_s": round(max(update["predicted_s"], update["collective_s"]), 2),
    }
