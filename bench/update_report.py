"""The tables of `python -m bench update`, and under which conditions they hold."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console

from bench.columns import cell_heads, cell_table
from bench.harness import print_findings

CELLS = {
    "way": (
        "trl_images: TRL's GRPOTrainer, the clip as pictures; trl_video: patched to train on a video; original: "
        "VideoChat-R1's recipe; ours, on the same prompt as the way above it",
        "{way}",
    ),
    "step ms": ("median of the rounds; quartiles behind it", "{step_ms:.0f} ({step_low_ms:.0f}-{step_high_ms:.0f})"),
    "update ms": (
        "the same of the update, a part of the step",
        "{update_ms:.0f} ({update_low_ms:.0f}-{update_high_ms:.0f})",
    ),
    "ours is x faster": (
        "that way's median over the median of ours in the same layout, step and update",
        "{step_ratio:.2f}, {update_ratio:.2f}",
    ),
    "peak MB": (
        "most bytes of tensors alive at a time in a step, beside weights and moments",
        lambda row: f"{row['peak_bytes'] / 1e6:.0f}",
    ),
    "ours needs x less": ("that way's peak over ours", "{peak_ratio:.2f}"),
    "loss": ("distance from float64, absolute", "{loss_error:.1e}"),
    "gradient": ("distance from float64, relative, over all weights together", "{gradient_error:.1e}"),
}
COLUMN_HEADS = cell_heads(CELLS)
CONDITIONS = (
    "CPU, float32, the packaged model of 1 M parameters: its head is small, and the vision tower a large part of it. "
    "Ratios show work that is saved; times mean nothing for a GPU.",
    "Same weights, prompt and pixels; gradients are compared on the same answers, timed steps draw their own, of R "
    "tokens, none a placeholder of a picture; no KL; no recomputation; learning rate 0.",
    "One group a step. Decoding the clip is in no time; cutting it into patches is in every step.",
    "For TRL: its pictures each stand for two frames, so that a prompt as pictures is no longer than as a video. With "
    "every frame as a picture it would have nearly twice the tokens.",
    "Against TRL: on a CPU its head scores the prompt's tokens too, on a GPU only the answers'; and it draws with "
    "transformers, where many would have vLLM.",
    "Against TRL: its processor cuts the pictures for each of the G rows, twice. A video is cut for it by our code.",
    "For TRL: its head's chunks of 32,768 entries of the vocabulary are cut to the 633 there are.",
    "For ours: it holds the weights twice, in learner and engine, and weights are in no peak.",
    "For the original: without its reference model, its recomputation and its offloading.",
)


def print_update_report(result: dict[str, Any]) -> None:
    console = Console(width=150)
    for (prompt, layout), rows in groupby(result["rows"], key=lambda row: (row["prompt_tokens"], row["layout"])):
        first = (listed := list(rows))[0]
        sizes = f"R {first['completion_tokens']}, G {first['group_size']}, {first['repeats']} rounds"
        console.print(cell_table(f"P {prompt} as {layout}, {sizes}", CELLS, listed))
    for row in result["growth"]:
        times = ", ".join(f"G {size}: {ms:.0f} ms" for size, ms in row["step_ms"].items())
        name = f"{row['way']}, {row['layout']}, P {row['prompt_tokens']}"
        console.print(f"growth of a step, {name}: G^{row['exponent']:.2f} ({times})")
    for row in result["absent"]:
        console.print(f"could not run: {row['way']}: {row['reason']}")
    print_findings(console, result)
    for line in result["conditions"]:
        console.print(f"condition: {line}", highlight=False)
