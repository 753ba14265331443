"""One GRPO update's forward and backward: a packed row against the same group as G separate rows, in one run.

Separate rows: the stock Hugging Face forward on a batch of G rows of equal length (so nothing is lost to padding), the
vision tower once per row, the head on completion rows only. Packed: `PolicyModel`. Both are checked to give the same
loss before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.groups import random_group
from vcr1_fast.config import AlgorithmConfig, ModelConfig
from vcr1_fast.learner.model import PolicyModel, load_hugging_face, load_tokenizer
from vcr1_fast.learner.objective import grpo_objective
from vcr1_fast.learner.packing import pack
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.types import RolloutGroup

# (frame pairs, patches down and across, completion tokens, completions). 112 x 112 pixels are 8 x 8 patches: 16 tokens.
# From the demo's own shape to prompts much longer than answers, where sharing pays most, and back to G = 2.
POINTS = [(8, 8, 60, 8), (32, 8, 60, 8), (64, 8, 60, 8), (64, 8, 240, 8), (32, 8, 60, 2)]
NUM_TEXT_TOKENS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each point; the median counts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every point with the packaged tiny model; `rows` holds one entry per point."""
    rows = [measure(point, arguments.repeats) for point in POINTS]
    table = Table(title="forward + backward of one group: packed against G separate rows (tiny model)")
    for column in ("P", "R", "G", "tokens ratio", "time ratio", "separate ms", "packed ms", "loss difference"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["prompt_tokens"]), str(row["completion_tokens"]), str(row["group_size"]),
            f"{row['token_ratio']:.2f}", f"{row['time_ratio']:.2f}",
            f"{row['separate_ms']:.0f}", f"{row['packed_ms']:.0f}", f"{row['loss_difference']:.1e}",
        )  # fmt: skip
    Console().print(table)
    return {"rows": rows}


def measure(point: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    group = make_group(*point)
    stock = load_hugging_face("tiny", torch.float32, torch.device("cpu"))
    policy = PolicyModel(copy.deepcopy(stock), ModelConfig(), torch.float32)
    num_completions = len(group.completions)
    weights = [[1.0 / (num_completions * c.num_tokens) for c in group.completions]]
    batch = pack([group], weights)
    objective = grpo_objective(batch, None, AlgorithmConfig())

    def packed() -> Tensor:
        return policy(batch, 1.0, objective)[0]

    separate_loss, packed_loss = separate_rows(stock, group).item(), packed().item()
    times_s = interleaved_times_s([lambda: separate_rows(stock, group), packed], repeats)
    separate_s, packed_s = (statistics.median(t) for t in times_s)
    return {
        "prompt_tokens": group.prompt.token_ids_L.numel(),
        "completion_tokens": point[2],
        "group_size": num_completions,
        "token_ratio": batch.num_unshared_tokens / batch.num_tokens,
        "time_ratio": separate_s / packed_s,
        "separate_ms": separate_s * 1e3,
        "packed_ms": packed_s * 1e3,
        "spread_ms": [(max(t) - min(t)) * 1e3 for t in times_s],
        "loss_difference": abs(separate_loss - packed_loss),
    }


def interleaved_times_s(losses: list[Callable[[], Tensor]], repeats: int) -> list[list[float]]:
    """Seconds of forward + backward, the ways taking turns so that a slow moment of the machine meets both."""
    times_s: list[list[float]] = [[] for _ in losses]
    for repeat in range(repeats + 1):
        for loss, series in zip(losses, times_s, strict=True):
            began = time.perf_counter()
            loss().backward()
            if repeat:  # the first round warms up
                series.append(time.perf_counter() - began)
    return times_s


def separate_rows(hf: Qwen2_5_VLForConditionalGeneration, group: RolloutGroup) -> Tensor:
    """The same GRPO loss from a batch of G rows through the stock model; completions must be of one length."""
    prompt, num_rows = group.prompt, len(group.completions)
    fed_GR = torch.stack([c.token_ids_R for c in group.completions])
    ids_GL = torch.cat([prompt.token_ids_L.expand(num_rows, -1), fed_GR[:, :-1]], dim=1)
    extra = prompt.next_position + torch.arange(fed_GR.shape[1] - 1)
    positions = torch.cat([prompt.position_ids_3L, extra.expand(3, -1)], dim=1)
    logits = hf(
        input_ids=ids_GL,
        pixel_values_videos=prompt.patches.values_PC.repeat(num_rows, 1),
        video_grid_thw=torch.tensor([prompt.patches.grid_thw] * num_rows),
        position_ids=positions[:, None].expand(-1, num_rows, -1),
        logits_to_keep=fed_GR.shape[1],
        use_cache=False,
    ).logits
    logprob_GR = torch.log_softmax(logits, -1).gather(2, fed_GR[..., None])[..., 0]
    ratio_GR = torch.exp(logprob_GR - logprob_GR.detach())
    advantage_G1 = torch.tensor(group.advantages, dtype=torch.float32)[:, None]
    return -(ratio_GR * advantage_G1).mean()  # at ratio 1 nothing is clipped


def make_group(num_pairs: int, side_patches: int, num_tokens: int, num_completions: int) -> RolloutGroup:
    """A random group of the given size for the tiny model."""
    special = SpecialIds.of(load_tokenizer("tiny"))
    grid = (num_pairs, side_patches, side_patches)
    return random_group(grid, NUM_TEXT_TOKENS, (num_tokens,) * num_completions, special.video_pad)
