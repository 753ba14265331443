"""`python -m bench learner`: what an update of Qwen2.5-VL-7B costs each GPU, counted on fake ones; predicted seconds.

No GPU is needed and nothing is timed: the real load and update run on tensors without values (vcr1_fast.fake_gpu). One
group of 8 answers of 300 to 512 tokens is on each GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.columns import heads_of, print_rows
from bench.update_meter import ANSWERS, ATTENTIONS, CLIPS, Point, count
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.learner.recompute import RECOMPUTE

WORLDS = (8, 64)
COLUMNS = {
    "prompt": ("P", "tokens of the prompt"),
    "num_gpus": ("GPUs", "in the world; counts are those of one of them"),
    "load_peak_gb": ("load, GB", "most memory while weights are loaded"),
    "peak_gb": ("update, GB", "most memory during an update, without fragmentation, NCCL's buffers and CUDA's context"),
    "tflop": ("TFLOP", "of products and attention, what is recomputed included"),
    "launches": ("launches", "of kernels"),
    "syncs": ("waits", "of the host for the GPU"),
    "copies": ("copies", "from the host to the GPU that nobody waits for"),
    "blocking_copies": ("blocking", "copies that the host waits for"),
    "collectives": ("coll.", "collectives"),
    "network_s": ("their s", "PREDICTED seconds of these on their links, beside the kernels"),
    "elementwise_gb": ("moved, GB", "read and written by kernels that are neither products nor attention"),
    "predicted_s": ("s", "PREDICTED seconds: the kernels one after the other, or the network where that takes longer"),
    "tokens_per_s": ("tokens/s", "packed tokens a second on one GPU, predicted"),
    "mfu": ("MFU", "FLOPs without what is recomputed, over 989 TFLOP/s x seconds predicted"),
}
COLUMN_HEADS = heads_of(COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is recomputed and which attention runs, for all points."""
    parser.add_argument("--recompute", choices=RECOMPUTE, default="full", help="as model.gradient_checkpointing")
    parser.add_argument(
        "--attention", choices=ATTENTIONS, default="fa2", help="version of flash-attn; torch's own is fa2"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each number of GPUs and prompt length."""
    model = whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"])
    settings = (f"model.gradient_checkpointing={arguments.recompute}",)
    options = {"attention": arguments.attention, "settings": settings}
    points = [
        Point(f"{clip} on {world}", model, grid, num_gpus=world, **options)
        for world in WORLDS
        for clip, grid in CLIPS.items()
    ]
    rows = count(points)
    print_rows(rows, COLUMNS, "an update of 7B on each GPU; seconds are predicted, none was measured")
    return {"rows": rows, "rates": vars(points[0].rates), "answers": ANSWERS, "recompute": arguments.recompute}
