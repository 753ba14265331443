"""One update at one point (model, clip, answers, GPUs), counted on fake GPUs: what `learner` and `predict` print.

Few blocks are run and extrapolated to the whole model, which the tests show to be right to 1 %. What is recomputed is
what a run would choose whose longest clip and answers are those of the point, unless a setting says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from bench.floors import shared_pairs
from bench.flops import decoder_flop, head_flop, tower_flop
from vcr1_fast.fake_gpu.costs import ATTENTION, GEMM
from vcr1_fast.fake_gpu.extrapolate import Size, combined, peak_of, sizes_to_run, to_blocks
from vcr1_fast.fake_gpu.flash_packages import FlashVersion
from vcr1_fast.fake_gpu.groups import TEXT_TOKENS
from vcr1_fast.fake_gpu.predict import H100_RATES, H200_RATES, Rates
from vcr1_fast.fake_gpu.process import Case
from vcr1_fast.fake_gpu.process import run as run_cases
from vcr1_fast.fake_gpu.sizes import num_blocks, with_blocks
from vcr1_fast.learner.engine_sums import engine_bytes, lends_memory
from vcr1_fast.learner.memory_sums import with_recompute
from vcr1_fast.learner.model_size import ModelSize, model_size
from vcr1_fast.run.telemetry import progress
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_config

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "qwen2_5_vl_7b_cotraining_8xh100.yaml"
ANSWERS = (300, 330, 360, 390, 420, 450, 480, 512)
CLIPS = {"3.8k": (10, 34, 42), "16.6k": (46, 34, 42)}  # prompt tokens: frame pairs, rows, columns of patches
PEAK_FLOP_S = 989e12  # of an H100 and an H200, dense bfloat16
GPUS: dict[str, tuple[float, Rates]] = {"H100": (80.0, H100_RATES), "H200": (141.0, H200_RATES)}  # GB, rates
ATTENTIONS: tuple[FlashVersion, ...] = ("fa2", "fa3", "fa4")  # of flash-attn; torch's own is fa2
PARTS: tuple[str, ...] = ("tower", "decoder products", "attention", "element-wise", "head", "optimizer")
TIMEOUT_S = 3600.0
WHOLE_BLOCKS = 12  # of decoder and tower together, at most, that are run without extrapolation


@dataclass(frozen=True)
class Point:
    """One update: so many groups with a clip and answers of these sizes on each of the GPUs."""

    name: str
    model: Mapping[str, Any] = field(repr=False)  # config.json
    grid: tuple[int, int, int]
    answers: tuple[int, ...] = ANSWERS
    num_gpus: int = 8
    groups: int = 1  # on each GPU
    gpu: str = "H100"
    attention: FlashVersion = "fa2"
    config: Path = CONFIG
    settings: tuple[str, ...] = ()  # `a.b=c`, over the file's
    text_tokens: int = TEXT_TOKENS
    measured_rates: Rates | None = None  # instead of the GPU's

    @property
    def prompt(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4 + self.text_tokens

    @property
    def num_tokens(self) -> int:
        """Of the packed groups on one GPU."""
        return self.groups * (self.prompt + sum(self.answers) - len(self.answers))

    @property
    def size(self) -> ModelSize:
        return model_size(self.model, self.name)

    @property
    def rates(self) -> Rates:
        return self.measured_rates or GPUS[self.gpu][1]

    def options(self) -> tuple[str, ...]:
        """`--a.b=c`: the point's sizes as the largest that the settings allow, and what is recomputed."""
        pairs, rows, columns = self.grid
        tokens = rows * columns // 4
        sizes = {
            "train.prompts_per_step": self.groups * self.num_gpus,
            "rollout.group_size": len(self.answers),
            "rollout.max_new_tokens": max(self.answers),
            "video.min_frames": 2 * pairs,
            "video.max_frames": 2 * pairs,
            "video.total_pixels": pairs * tokens * self.size.video.factor_px**2,
            "video.max_frame_pixels": tokens * self.size.video.factor_px**2,
        }
        options = (*(f"--{name}={value}" for name, value in sizes.items()), *(f"--{word}" for word in self.settings))
        config = load_config(str(self.config), list(options))
        mode = with_recompute(config, self.size, self.num_gpus, GPUS[self.gpu][0]).model.gradient_checkpointing
        return (*options, f"--model.gradient_checkpointing={mode}")

    def loaded(self) -> Config:
        return load_config(str(self.config), list(self.options()))


def count(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row for each point, in their order: counts of a steady update on one GPU, and seconds by the point's rates.

    Raises RuntimeError with the traceback of a case that raised.
    """
    cases = {}
    for point in points:
        options, updates = point.options(), (((point.grid, point.answers),) * point.groups,) * 2
        for size in _sizes(point):  # the first update makes the optimizer's moments
            name, model = f"{point.name} {size}", with_blocks(point.model, *size)
            cases[point.name, size] = Case(
                name,
                point.num_gpus,
                str(point.config),
                model,
                updates,
                text_tokens=point.text_tokens,
                overrides=options,
                rates=point.rates,
                flash=point.attention,
            )
    reports = {}
    for report in progress(run_cases(list(cases.values()), TIMEOUT_S), "updates on fake GPUs", len(cases)):
        if "error" in report:
            raise RuntimeError(f"{report['name']}: {report['traceback']}")
        reports[report["name"]] = report
    return [_row(point, {size: reports[f"{point.name} {size}"] for size in _sizes(point)}) for point in points]


def _sizes(point: Point) -> list[Size]:
    """Blocks of the models to run: a small one is run as it is."""
    blocks = num_blocks(point.model)
    return [blocks] if sum(blocks) <= WHOLE_BLOCKS else sizes_to_run()


def _row(point: Point, reports: Mapping[Size, Mapping[str, Any]]) -> dict[str, Any]:
    blocks, config = num_blocks(point.model), point.loaded()
    load, update = (
        combined([(1.0, parts[blocks])]) if blocks in parts else to_blocks(parts, blocks)
        for parts in (
            {size: report["load"] for size, report in reports.items()},
            {size: report["updates"][-1] for size, report in reports.items()},
        )
    )
    seconds = max(update["predicted_s"], update["collective_s"])
    peak_gb, gpu_gb = peak_of(update).num_bytes / 1e9, GPUS[point.gpu][0]
    engine = {} if lends_memory(config.rollout) else engine_bytes(config.rollout, point.size, 2)
    return {
        "name": point.name,
        "prompt": point.prompt,
        "answers": point.answers,
        "groups": point.groups,
        "num_gpus": point.num_gpus,
        "gpu": point.gpu,
        "attention": point.attention,
        "recompute": config.model.gradient_checkpointing,
        "load_peak_gb": round(peak_of(load).num_bytes / 1e9, 1),
        "peak_gb": round(peak_gb, 1),
        "fits": peak_gb + sum(engine.values()) / 1e9 <= gpu_gb,
        "tflop": round((update["gemm_flop"] + update["attention_flop"]) / 1e12),
        "launches": update["launches"],
        "syncs": sum(update["syncs"].values()),
        "copies": sum(update["copies"].values()),
        "blocking_copies": sum(update["blocking_copies"].values()),
        "collectives": update["collectives"],
        "elementwise_gb": round(update["moved_bytes"] / 1e9),
        "predicted_s": round(seconds, 3),
        "network_s": round(update["collective_s"], 3),
        "tokens_per_s": round(point.num_tokens / seconds),
        "mfu": round(model_flop(point) / (PEAK_FLOP_S * seconds), 3),
        "parts_s": {part: round(value, 4) for part, value in split(update["kernels"]).items()},
        "kernels": by_name(update["kernels"]),
    }


def model_flop(point: Point) -> float:
    """Of forward and backward on one GPU, nothing recomputed: a backward is twice its forward."""
    hf_config: Any = AutoConfig.for_model(**point.model)
    text, fed = hf_config.text_config, [length - 1 for length in point.answers]
    tokens, pairs = point.num_tokens // point.groups, shared_pairs(point.prompt, fed)
    decoder = decoder_flop(text, tokens, pairs) + head_flop(text, sum(point.answers))
    return point.groups * 3 * (decoder + tower_flop(hf_config.vision_config, [point.grid]))


def split(kernels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Seconds of the update's kernels by part; all of the tower's, the head's and the optimizer's are theirs.

    `kernels`: phase -> name -> counts, as in fake_gpu.learner.Measured. FSDP's copies count as element-wise.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    for phase, named in kernels.items():
        whole = next((part for part in ("tower", "head", "optimizer") if phase.startswith(part)), None)
        for name, kernel in named.items():
            is_product, is_attention = name.startswith(GEMM), name.startswith(ATTENTION)
            own = "decoder products" if is_product else "attention" if is_attention else "element-wise"
            parts[whole or own] += kernel["seconds"]
    return parts


def by_name(kernels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """All phases together."""
    total: dict[str, dict[str, float]] = {}
    for named in kernels.values():
        for name, counts in named.items():
            entry = total.setdefault(name, dict.fromkeys(counts, 0.0))
            for key, value in counts.items():
                entry[key] += value
    return total
