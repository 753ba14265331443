"""The values of a new configuration, each with its reason: for a model, rows of one's own, and a number of GPUs.

In: `Facts`, what was read of model and data. Out: `Choice` by dotted key, in the order of the file to write. What the
packaged configurations have is taken first; what does not fit into a GPU is lowered, by the sums of `train --dry-run
--fast`. Called by init.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vcr1_fast.learner.memory_sums import (
    SMALLEST_GPU_GB,
    USABLE_FRAC,
    plan_memory,
    plan_tokens,
    trained_params,
    with_recompute,
)
from vcr1_fast.learner.model_size import ModelSize
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config
from vcr1_fast.video.formats import QWEN2_5_VL

TINY_PARAMS = 10_000_000  # a model below is the packaged one, or a child of it
LIMIT_GB = USABLE_FRAC * SMALLEST_GPU_GB
PROMPTS_PER_STEP = 8
MIN_STEPS = 100  # fewer updates at these learning rates change little
CPU_MAX = {"rollout.max_new_tokens": 256, "rollout.group_size": 4, "video.total_pixels": 512}  # pixels: in tokens

LORA = ("model.lora.rank", 32)
LORA_LEARNING_RATE = 1e-5  # as in the packaged configuration for one GPU: ten times that of whole weights
LOWER = (  # what is tried in turn where the worst step does not fit; the mildest first; video.total_pixels in tokens
    *(("train.tokens_per_microbatch", 16384), ("train.tokens_per_microbatch", 8192)),
    *(("rollout.max_batch_tokens", 32768), ("rollout.max_batch_tokens", 16384)),
    *(("video.max_frames", 384), ("video.total_pixels", 2560)),
    *(("rollout.max_new_tokens", 768), ("video.total_pixels", 1792), ("video.max_frames", 192)),
    *(("rollout.max_new_tokens", 512), ("video.total_pixels", 896), ("rollout.group_size", 4)),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the values follow from."""

    model: str  # as model.path is to be
    size: ModelSize
    train: tuple[str, ...]  # annotation files
    eval: tuple[str, ...]
    video_root: str | None
    num_by_task: Mapping[str, int]  # usable rows of `train`
    durations_s: Sequence[float]  # of those that say
    num_gpus: int  # 0: a CPU
    sglang_python: str | None  # None: there is no SGLang here
    output_dir: str

    @property
    def is_tiny(self) -> bool:
        return self.size.params < TINY_PARAMS

    @property
    def num_rows(self) -> int:
        return sum(self.num_by_task.values())


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and, in a sentence, why it is that."""

    value: Any
    why: str


Choices = dict[str, Choice]


def choose(facts: Facts) -> Choices:
    """All values. Raises ConfigError when the model does not fit however small the rest is."""
    chosen = _model(facts) | _data(facts) | _video(facts) | _rollout(facts) | _objective(facts) | _loop(facts)
    return _fitted(chosen, facts) if facts.num_gpus else _for_cpu(chosen, facts)


def config_of(chosen: Choices, start: Config | None = None) -> Config:
    """`start`, or the defaults, with these values. Raises ConfigError as the sections do."""
    config = start or Config()
    for key, choice in chosen.items():
        config = _with(config, key.split("."), choice.value)
    return config


def _with(section: Any, names: Sequence[str], value: Any) -> Any:
    first, *rest = names
    return replace(section, **{first: _with(getattr(section, first), rest, value) if rest else value})


@cache
def _packaged_config() -> Config:
    return load_config("tiny", [])


def _packaged(key: str) -> Any:
    """Of the example in the package, which the tiny model was tried with."""
    value: Any = _packaged_config()
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _model(facts: Facts) -> Choices:
    chosen = {"model.path": Choice(facts.model, f"{facts.size.params:,} parameters")}
    if not facts.num_gpus:
        return chosen | {"model.device": Choice("cpu", "no GPU was asked for; in float32")}
    if facts.is_tiny:
        return chosen
    return chosen | {
        "model.compute_dtype": Choice("bfloat16", "of forward and backward; the weights that are updated are float32"),
        "model.gradient_checkpointing": Choice("auto", "the backward pass computes again what does not fit"),
    }


def _data(facts: Facts) -> Choices:
    counted = ", ".join(f"{count:,} of {task}" for task, count in facts.num_by_task.items())
    chosen = {"data.train": Choice(facts.train, f"{facts.num_rows:,} usable rows: {counted}")}
    if facts.eval:
        chosen["data.eval"] = Choice(facts.eval, "held out: scored before the first and after the last step")
    else:
        chosen["data.eval"] = Choice((), "name held-out rows here to have a score before and after training")
    if facts.video_root:
        chosen["data.video_root"] = Choice(facts.video_root, "folder that the video paths in the rows start from")
    return chosen


def _video(facts: Facts) -> Choices:
    fps = Config().video.fps
    chosen = {"video.fps": Choice(fps, "frames a second that the model sees")}
    if facts.size.video.reads_times:
        chosen["task.timestamps"] = Choice("text", "Qwen3-VL knows the time of frames from words in the prompt alone")
    factor_px = facts.size.video.factor_px
    if facts.is_tiny:
        side = 3 * factor_px
        pixels, why = side**2, f"the tiny model was taught on frames of {side} x {side} pixels and reads no others"
        return chosen | {
            "video.max_frames": Choice(_packaged("video.max_frames"), "the tiny model was taught on clips of 8 s"),
            "video.min_frame_pixels": Choice(pixels, why),
            "video.max_frame_pixels": Choice(pixels, why),
        }
    most, longest_s = Config().video.max_frames, max(facts.durations_s, default=0.0)
    needed = max(2 * math.ceil(longest_s * fps / 2), Config().video.min_frames)
    if not facts.durations_s:
        frames = Choice(most, "the rows do not say how long the videos are; frames of longer ones are further apart")
    elif needed > most:
        apart = f"the longest video has {longest_s:,.0f} s, of which it takes a frame every {longest_s / most:.1f} s"
        frames = Choice(most, apart)
    else:
        frames = Choice(needed, f"all that the longest video has, {longest_s:,.0f} s")
    pixels = Config().video.total_pixels // QWEN2_5_VL.factor_px**2 * factor_px**2
    why = f"of a whole video, shared out over its frames; {factor_px} x {factor_px} of two frames are a token"
    return chosen | {"video.max_frames": frames, "video.total_pixels": Choice(pixels, why)}


def _rollout(facts: Facts) -> Choices:
    chosen: Choices = {}
    suits_sglang = facts.num_gpus and not facts.is_tiny
    if suits_sglang and facts.sglang_python:
        chosen["rollout.engine"] = Choice("sglang", "found here; each rank starts one on its own GPU")
        chosen["rollout.sglang.python"] = Choice(facts.sglang_python, "SGLang has an environment of its own")
    else:
        hint = "; SGLang is made for many long answers: make sglang" if suits_sglang else ""
        chosen["rollout.engine"] = Choice("local", f"the model answers in the trainer's own process{hint}")
    new_tokens = _packaged("rollout.max_new_tokens") if facts.is_tiny else Config().rollout.max_new_tokens
    return chosen | {
        "rollout.group_size": Choice(8, "answers to each question, which are compared with each other"),
        "rollout.temperature": Choice(1.0, "answers must differ; log-probs are taken at this temperature"),
        "rollout.max_new_tokens": Choice(new_tokens, "longest answer, its think block included"),
        "rollout.max_batch_tokens": Choice(Config().rollout.max_batch_tokens, "bounds the memory of answering"),
    }


def _objective(facts: Facts) -> Choices:
    if facts.is_tiny:
        return {
            f"optimizer.{name}": Choice(_packaged(f"optimizer.{name}"), "as in the packaged example")
            for name in ("learning_rate", "warmup_steps", "schedule")
        }
    chosen = {
        "algorithm.loss": Choice("dapo", "every token of a step weighs the same"),
        "algorithm.mask_truncated": Choice(True, "an answer that was cut says nothing about how it would have ended"),
        "optimizer.learning_rate": Choice(1e-6, "the usual one for all weights of a model of this size"),
        "optimizer.schedule": Choice("linear", "falls to 0 at the end"),
    }
    if facts.num_gpus and facts.sglang_python:
        why = "SGLang's bfloat16 differs a little from the learner's"
        chosen["algorithm.sampling_correction"] = Choice("token_truncate", why)
        chosen["algorithm.sampling_cap"] = Choice(2.0, "largest weight of that correction")
    return chosen


def _loop(facts: Facts) -> Choices:
    gpus = max(facts.num_gpus, 1)
    prompts = gpus * math.ceil(PROMPTS_PER_STEP / gpus)
    if facts.num_rows < prompts:
        prompts = gpus * max(1, facts.num_rows // gpus)
    steps = max(math.ceil(facts.num_rows / prompts), MIN_STEPS)
    passes = steps * prompts / facts.num_rows
    spoken = "one pass" if passes < 1.05 else f"{passes:.1f} passes"
    shared = f", a multiple of the {gpus} GPUs" if gpus > 1 else ""
    return {
        "train.output_dir": Choice(facts.output_dir, "checkpoints, metrics, answers and the report"),
        "train.num_steps": Choice(steps, f"{spoken} over {facts.num_rows:,} rows"),
        "train.prompts_per_step": Choice(prompts, f"questions in a step{shared}"),
        "train.tokens_per_microbatch": Choice(
            Config().train.tokens_per_microbatch, "packed tokens that go through the model at once"
        ),
    }


def phases_gb(config: Config, size: ModelSize, num_gpus: int) -> dict[str, float]:
    """Worst-case GB on each GPU by phase, as `train --dry-run --fast` sums them."""
    config = with_recompute(config, size, num_gpus, SMALLEST_GPU_GB)
    phases = plan_memory(config, size, plan_tokens(config, num_gpus, size.video.factor_px), num_gpus).by_phase()
    return {name: sum(parts.values()) for name, parts in phases.items()}


def _excess_gb(chosen: Choices, facts: Facts) -> float:
    needed = phases_gb(config_of(chosen), facts.size, facts.num_gpus)
    return sum(max(0.0, gb - LIMIT_GB) for gb in needed.values())


def _fitted(chosen: Choices, facts: Facts) -> Choices:
    smallest = chosen
    steps = [(key, _setting(key, value, facts)) for key, value in LOWER]
    for key, value in steps:
        smallest = _lowered(smallest, key, value)
    if _excess_gb(smallest, facts) > 0:
        chosen = _with_adapters(chosen, facts)
    for key, value in steps:
        excess = _excess_gb(chosen, facts)
        if excess == 0:
            return chosen
        tried = _lowered(chosen, key, value)
        chosen = tried if _excess_gb(tried, facts) < excess else chosen
    if _excess_gb(chosen, facts) == 0:
        return chosen
    phases = phases_gb(config_of(chosen), facts.size, facts.num_gpus)
    name = max(phases, key=lambda phase: phases[phase])
    raise ConfigError(
        f"{facts.model} does not fit into {facts.num_gpus} GPUs of {SMALLEST_GPU_GB:.0f} GB, even with adapters, short "
        f"answers and small frames: {name} needs {phases[name]:.0f} GB on each: give more GPUs"
    )


def _setting(key: str, value: int, facts: Facts) -> int:
    """Of LOWER or CPU_MAX, whose pixels are in tokens."""
    return value * facts.size.video.factor_px**2 if key == "video.total_pixels" else value


def _lowered(chosen: Choices, key: str, value: int) -> Choices:
    if key not in chosen or chosen[key].value <= value:
        return chosen
    why, _, earlier = chosen[key].why.partition("; lowered from ")
    first = earlier.partition(" ")[0] or f"{chosen[key].value:,}"
    return chosen | {key: Choice(value, f"{why}; lowered from {first} to fit into {SMALLEST_GPU_GB:.0f} GB")}


def _with_adapters(chosen: Choices, facts: Facts) -> Choices:
    key, rank = LORA
    config = config_of(chosen)
    tokens = plan_tokens(config, facts.num_gpus, facts.size.video.factor_px)
    static = plan_memory(config, facts.size, tokens, facts.num_gpus).static
    needed = f"{sum(static.values()):.0f} GB a GPU before the first token"
    adapters = {key: Choice(rank, f"adapters (LoRA): all weights with their moments and an engine take {needed}")}
    adapters["optimizer.learning_rate"] = Choice(LORA_LEARNING_RATE, "ten times that of whole weights, a first guess")
    return chosen | adapters


def _for_cpu(chosen: Choices, facts: Facts) -> Choices:
    """A CPU has no 80 GB to fill but little speed: what is not the tiny model gets short answers and small frames."""
    if facts.is_tiny:
        return chosen
    return chosen | {
        key: Choice(_setting(key, value, facts), f"{chosen[key].why}; small, for a CPU")
        for key, value in CPU_MAX.items()
    }


def checkpoint_gb(chosen: Choices, size: ModelSize) -> float:
    """Float32 weights and two moments of what is trained."""
    return 12 * trained_params(config_of(chosen), size) / 1e9
