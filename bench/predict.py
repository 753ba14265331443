"""`python -m bench predict`: seconds of a step, completions a second, MFU and hours of a model on 1 to 1,024 GPUs.

The update is counted on fake GPUs (update_meter.py), the rollout is the least that arithmetic and memory allow
(fake_gpu/predict.py), both by the rates that are stated there: EVERY SPEED OF A GPU HERE IS PREDICTED, NONE MEASURED. A
step is rollout, update and the push of weights, one after the other. Without a point of your own (`--frames`) four
cases are shown, two of which stand beside what other systems reported, and all updates that were measured on this
repository's behalf beside their prediction.

The last line holds under `cases`, by name: {update_s, tokens_per_s_per_gpu, mfu, completions_per_s_per_gpu}.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.columns import heads_of, print_rows
from bench.predict_points import PUBLIC, error_rows, own_points
from bench.update_meter import ATTENTIONS, CLIPS, CONFIG, GPUS, ROOT, Point, count
from vcr1_fast.commands.dry_run import worst_grid
from vcr1_fast.fake_gpu.groups import TEXT_TOKENS
from vcr1_fast.fake_gpu.predict import rollout_seconds
from vcr1_fast.learner.model_size import model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.settings.io import load_config

PAPER = ROOT / "configs" / "qwen2_5_vl_7b_cotraining_paper_8xh100.yaml"
# the engine whose seconds are predicted; its memory is the learner's during an update
ENGINE = ("rollout.engine=sglang", "rollout.sglang.release_memory=true")
MODELS = {name: whole_config(sizes) for name, sizes in PUBLIC_SIZES.items()}
PAIR_WORDS = 9  # "<12.5 seconds>" in 7 tokens, and the marks around the pair
CASES = ("group_3k8_7b_8", "group_16k6_7b_8", "easyvideor1_group_8b_h200", "videochat_r1_8xh100")
COLUMNS = {
    "name": ("case", "one group of G answers on each GPU, unless --groups says more"),
    "prompt": ("P", "tokens of the prompt"),
    "longest": ("R", "tokens of the longest answer"),
    "num_gpus": ("GPUs", "in the world"),
    "gpu": ("kind", "of GPU: its memory and its rates"),
    "attention": ("attn.", "version of flash-attn"),
    "recompute": ("recomputed", "what a run of these settings chooses to run again in backward, so that it fits"),
    "peak_gb": ("GB", "most memory of an update"),
    "fits": ("fits", "whether that, and an engine that stays, is within the GPU's memory"),
    "tflop": ("TFLOP", "of an update, what is recomputed included"),
    "predicted_s": ("update s", "PREDICTED: the kernels one after the other, or the network where that takes longer"),
    "network_s": ("network s", "of it, behind the kernels"),
    "rollout_s": ("rollout s", "PREDICTED: products of the prompts, then weights and caches read for each token"),
    "step_s": ("step s", "rollout, update and push of the weights"),
    "tokens_per_s": ("tokens/s", "packed tokens of an update, a second and GPU"),
    "mfu": ("MFU", "FLOPs of the update without what is recomputed, over 989 TFLOP/s x its seconds"),
    "completions_per_s": ("compl./s", "answers of a step, a second and GPU"),
    "hours": ("hours", "for as many prompts as --prompts says"),
}
PUBLIC_COLUMNS = {
    "system": ("system", "as its authors, or users, reported it"),
    "hardware": ("its GPUs", "on which"),
    "quantity": ("quantity", "s of an update: of one group on one GPU; compl./s: of a whole step, a GPU"),
    "reported": ("reported", "their number"),
    "predicted": ("ours, predicted", "for the same group on the GPUs of our case"),
    "note": ("not comparable", "what differs"),
}
ERROR_COLUMNS = {
    "file": ("file", "in bench/results"),
    "size": ("point", "model, prompt, answer and group"),
    "measured_ms": ("measured ms", "median of an update there"),
    "predicted_ms": ("predicted ms", "by the meter's counts, at the product and copy rates measured in the same run"),
    "error": ("error", "predicted over measured, less 1"),
}
COLUMN_HEADS = heads_of(COLUMNS, PUBLIC_COLUMNS, ERROR_COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One point, on several numbers of GPUs; without --frames the four cases."""
    parser.add_argument("--case", nargs="+", choices=CASES, default=[], help="these of the four, and nothing else")
    parser.add_argument("--frames", type=int, default=None, help="of the clip: a point of your own")
    parser.add_argument(
        "--video-tokens", type=int, default=None, help="most tokens of the clip (default: the config's)"
    )
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-VL-7B", help="public sizes; no weights are needed")
    parser.add_argument("--answer", type=int, default=512, help="R, tokens of each answer")
    parser.add_argument("--group-size", type=int, default=8, help="G, answers to a prompt")
    parser.add_argument("--groups", type=int, default=1, help="of each GPU in a step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs, 1 to 1024")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--attention", choices=ATTENTIONS, default="fa3", help="version of flash-attn")
    parser.add_argument("--config", type=Path, default=CONFIG, help="settings besides (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="settings over the file's")
    parser.add_argument("--prompts", type=int, default=None, help="for the hours (default: all steps of the config)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points, and without one of the caller's what was measured beside its prediction.

    Raises SystemExit for a number of GPUs that is not in 1 to 1,024.
    """
    points = [own_point(arguments, num_gpus) for num_gpus in arguments.gpus] if arguments.frames else cases(arguments)
    measured = [] if arguments.frames or arguments.case else own_points()
    counted = count([*points, *(point for _, point in measured)])
    prompts = arguments.prompts or prompts_of(arguments.config)
    rows = [whole_step(point, row, prompts) for point, row in zip(points, counted[: len(points)], strict=True)]
    print_rows(rows, COLUMNS, f"a step, PREDICTED, none was measured; hours for {prompts:,} prompts")
    found = {row["name"]: row for row in rows}
    public = [entry | {"predicted": found[entry["case"]][entry["key"]]} for entry in PUBLIC if entry["case"] in found]
    errors = error_rows([row for row, _ in measured], counted[len(points) :])
    if public:
        print_rows(public, PUBLIC_COLUMNS, "other systems, as reported, and ours, predicted")
    if errors:
        print_rows(errors, ERROR_COLUMNS, "every update that was measured, and what is predicted for it")
    return {
        "rates": {point.name: vars(point.rates) for point in points},
        "rows": rows,
        "public": public,
        "errors": errors,
        "cases": {row["name"]: case_of(row) for row in rows},
    }


def cases(arguments: argparse.Namespace) -> list[Point]:
    """What the predictions are held to; the 3.8k and 16.6k groups are those of `bench learner`."""
    seven, eight = MODELS["Qwen2.5-VL-7B"], MODELS["Qwen3-VL-8B"]
    points = [
        Point(CASES[0], seven, CLIPS["3.8k"]),
        Point(CASES[1], seven, CLIPS["16.6k"]),
        # 256 frames, a pair of 132 tokens and 9 for its time and marks: 18.2k, where 18.3k were reported; a group a GPU
        Point(
            CASES[2],
            eight,
            (128, 22, 24),
            (1000,) * 8,
            num_gpus=32,
            gpu="H200",
            text_tokens=TEXT_TOKENS + 128 * PAIR_WORDS,
        ),
        # a clip of 30 s at 2 frames a second under the original's budget, its recipe with a reference model
        Point(CASES[3], seven, (30, 14, 34), config=PAPER),
    ]
    chosen = {"attention": arguments.attention, "settings": (*ENGINE, *arguments.set)}
    return [replace(point, **chosen) for point in points if not arguments.case or point.name in arguments.case]


def own_point(arguments: argparse.Namespace, num_gpus: int) -> Point:
    """The clip as the config's resolution rule has it."""
    if not 1 <= num_gpus <= 1024:
        raise SystemExit(f"bench predict: --gpus is {num_gpus}, wanted 1 to 1024")
    if arguments.frames < 2 or arguments.frames % 2:
        raise SystemExit(f"bench predict: --frames is {arguments.frames}, wanted an even number from 2 on")
    video = load_config(str(arguments.config), [f"--{word}" for word in arguments.set]).video
    video = replace(video, min_frames=arguments.frames, max_frames=arguments.frames)
    factor_px = model_size(MODELS[arguments.model], arguments.model).video.factor_px
    if arguments.video_tokens:
        video = replace(video, total_pixels=arguments.video_tokens * factor_px**2)
    return Point(
        f"{arguments.model} on {num_gpus}",
        MODELS[arguments.model],
        worst_grid(video, factor_px),
        (arguments.answer,) * arguments.group_size,
        num_gpus,
        arguments.groups,
        arguments.gpu,
        arguments.attention,
        arguments.config,
        (*ENGINE, *arguments.set),
    )


def prompts_of(config: Path) -> int:
    train = load_config(str(config), []).train
    return train.num_steps * train.prompts_per_step


def whole_step(point: Point, row: dict[str, Any], prompts: int) -> dict[str, Any]:
    """`row` with the rollout, the push of weights in bfloat16, and what follows for a step without overlap."""
    rollout_s = rollout_seconds(point.size, point.rates, point.prompt, point.answers, point.groups)
    push_s = point.rates.collective_seconds(2 * point.size.params, range(point.num_gpus))
    step_s = rollout_s + row["predicted_s"] + push_s
    return row | {
        "longest": max(point.answers),
        "rollout_s": round(rollout_s, 3),
        "push_s": round(push_s, 3),
        "step_s": round(step_s, 3),
        "completions_per_s": round(point.groups * len(point.answers) / step_s, 3),
        "hours": round(prompts / (point.groups * point.num_gpus) * step_s / 3600, 2),
    }


def case_of(row: dict[str, Any]) -> dict[str, float]:
    return {
        "update_s": row["predicted_s"],
        "tokens_per_s_per_gpu": row["tokens_per_s"],
        "mfu": row["mfu"],
        "completions_per_s_per_gpu": row["completions_per_s"],
    }
