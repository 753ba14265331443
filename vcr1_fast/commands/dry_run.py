"""A run's worst step on fake GPUs: measured with few blocks and rows, extrapolated to the whole model and its step.

Seconds are predictions, by the rates of the GPU that is present, or those of fake_gpu/predict.py. An update's kernels
run one after the other and its collectives behind them; decoding is bound by reading weights and the cache, or by
launches.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vcr1_fast.fake_gpu.extrapolate import SMALL, Peak, Size, peak_of, sizes_to_run, to_blocks, to_rows
from vcr1_fast.fake_gpu.predict import Rates, rollout_seconds
from vcr1_fast.fake_gpu.present import present_rates
from vcr1_fast.fake_gpu.process import Case, run
from vcr1_fast.fake_gpu.shim import FakeGpuError
from vcr1_fast.fake_gpu.sizes import num_blocks, with_blocks
from vcr1_fast.learner.adamw_8bit import MOMENT_BYTES
from vcr1_fast.learner.engine_sums import engine_bytes, lends_memory, prompts_at_once
from vcr1_fast.learner.memory_sums import TokenPlan, video_bytes, video_tokens
from vcr1_fast.learner.model_size import ModelSize
from vcr1_fast.run.telemetry import progress
from vcr1_fast.settings.config import Config, VideoConfig
from vcr1_fast.settings.io import config_to_yaml

GATHER_BYTES = 2_500_000_000  # at most, beside the shards, while weights are pushed or exported: learner/gathering.py


@dataclass(frozen=True)
class Measured:
    """What the steps on fake GPUs came to, for the whole model."""

    phases: dict[str, dict[str, float]]  # GB on each GPU by kind
    learner: dict[str, float]
    predicted: dict[str, float]  # seconds, hours
    rates: Rates  # by which


def measure(
    config: Config,
    model: Mapping[str, Any],
    size: ModelSize,
    tokens: TokenPlan,
    num_gpus: int,
) -> Measured:
    """Run the cases and put them together. `model`: config.json.

    Raises FakeGpuError where no GPU can be played here, or when a case raises: then a run would, too.
    """
    blocks, rates = num_blocks(model), present_rates()
    grid = worst_grid(config.video, size.video.factor_px)
    grids = {"rollout": grid, "evaluation": worst_grid(config.eval_video, size.video.factor_px)}
    num_rows = math.ceil(tokens.groups_per_gpu / tokens.groups_per_row)
    row = ((grid, (tokens.completion,) * config.rollout.group_size),) * tokens.groups_per_row
    updates = (row, row, row * 2) if num_rows > 1 else (row, row)  # the first one makes the optimizer's moments
    reports: dict[tuple[str, Size], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.yaml"
        settings.write_text(config_to_yaml(config), encoding="utf-8")
        cases: dict[str, tuple[str, Size, Case]] = {}
        for shrunk in sizes_to_run():
            small = with_blocks(model, *shrunk)
            kinds = {"learner": Case("", num_gpus, str(settings), small, updates, overrides=_ONE_UPDATE)}
            if config.rollout.engine == "local":
                for name, _, prompts, answers in _engine_chunks(config, tokens, num_gpus):
                    shown = (grids[name],) * prompts
                    kinds[name] = Case("", 1, str(settings), small, prompts=shown, group_size=answers)
            for kind, case in kinds.items():
                name = f"{kind} with {shrunk[0]} layers, {shrunk[1]} + {shrunk[2]} tower blocks"
                cases[name] = (kind, shrunk, replace(case, name=name, rates=rates))
        reported = run([case for _, _, case in cases.values()])
        for report in progress(reported, "the worst step, on fake GPUs", len(cases)):
            if "error" in report:
                raise FakeGpuError(f"{report['name']}: {report['error'].splitlines()[0]}")
            kind, shrunk, _ = cases[report["name"]]
            reports[kind, shrunk] = report
    return _whole(config, size, tokens, num_gpus, reports, blocks, num_rows, rates)


# Moments of 8 bits are float32 ones for the GPUs that are played, since torchao compiles its step; see `_with_moments`
_ONE_UPDATE = ("--algorithm.minibatches_per_rollout=1", "--optimizer.name=adamw")


def worst_grid(config: VideoConfig, factor_px: int) -> tuple[int, int, int]:
    """Patches of the clip with most tokens: frame pairs, rows, columns."""
    num_frames = max(
        range(config.min_frames, config.max_frames + 1, 2), key=lambda n: video_tokens(n, config, factor_px)
    )
    per_pair = video_tokens(num_frames, config, factor_px) // (num_frames // 2)
    rows = math.isqrt(per_pair)
    return num_frames // 2, 2 * rows, 2 * (per_pair // rows)


def _engine_chunks(config: Config, tokens: TokenPlan, num_gpus: int) -> list[tuple[str, int, int, int]]:
    """(phase, tokens of a prompt, prompts, answers to each) of the largest chunks of the local engine."""
    group, per_gpu = config.rollout.group_size, config.train.prompts_per_step // num_gpus
    together = min(per_gpu, prompts_at_once(config.rollout, tokens.prompt, group, tokens.completion))
    chunks = [("rollout", tokens.prompt, together, group)]
    if config.data.eval:
        new_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
        together = prompts_at_once(config.rollout, tokens.eval_prompt, 1, new_tokens)
        chunks.append(("evaluation", tokens.eval_prompt, together, 1))
    return chunks


def groups_held(config: Config, num_gpus: int) -> int:
    """Of each GPU, at most: those of a step and of the steps that are drawn ahead, and what a step leaves for the next.
    Their clips are on the GPU from the time they are read until they are learned from."""
    per_gpu = config.train.prompts_per_step // num_gpus
    return (1 + config.rollout.max_policy_lag) * per_gpu + math.ceil(config.rollout.over_provision * per_gpu)


def _whole(
    config: Config,
    size: ModelSize,
    tokens: TokenPlan,
    num_gpus: int,
    reports: Mapping[tuple[str, Size], Mapping[str, Any]],
    blocks: Size,
    num_rows: int,
    rates: Rates,
) -> Measured:
    sizes = sizes_to_run()

    def grown(kind: str, part: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
        return to_blocks({shrunk: part(reports[kind, shrunk]) for shrunk in sizes}, blocks)

    load = grown("learner", lambda report: report["load"])
    one = grown("learner", lambda report: report["updates"][1])
    two = grown("learner", lambda report: report["updates"][-1]) if num_rows > 1 else one
    update, peak = to_rows(one, two, num_rows), _with_moments(peak_of(two), config)
    width = 4 if config.model.compute_dtype == "float32" else 2
    engine = engine_bytes(config.rollout, size, width)
    token_bytes = size.kept_token_bytes
    clips = token_bytes * tokens.prompt * groups_held(config, num_gpus)
    video = video_bytes(config)
    learner, lends = {kind: peak.kinds.get(kind, 0) for kind in ("weights", "moments")}, lends_memory(config.rollout)
    static = learner | video | ({} if lends else engine)
    phases: dict[str, dict[str, float]] = {
        "load": load["peaks"]["load"] | video,
        "update": {**peak.kinds, "clips": clips, **video, **({} if lends else engine)},
        "export": {**static, "gathered": min(GATHER_BYTES, width * size.params) if num_gpus > 1 else 0},
    }
    if lends:
        phases["rollout"] = learner | video | {"clips": clips} | engine
    seconds = {"update_s": max(update["predicted_s"], update["collective_s"])}
    seconds["update_s"] *= config.algorithm.minibatches_per_rollout
    group = (tokens.completion,) * config.rollout.group_size  # of SGLang, until the local engine's takes its place
    rollout_s = rollout_seconds(size, rates, tokens.prompt, group, config.train.prompts_per_step / num_gpus)
    asked = _engine_chunks(config, tokens, num_gpus) if config.rollout.engine == "local" else []
    for phase, prompt, prompts, answers in asked:
        few, more = (grown(phase, lambda report, n=n: report["answers"][n]) for n in ("2", "4"))
        limit = tokens.completion if phase == "rollout" else config.eval.max_new_tokens or tokens.completion
        cache = size.kv_bytes_per_token * prompts * (prompt + answers * limit)
        working = max(cache, more["peaks"]["rollout"].get("KV cache and activations", 0))
        phases[phase] = {**static, "clips": token_bytes * prompt * prompts, "KV cache and activations": working}
        if phase == "rollout":
            per_token = max((more["predicted_s"] - few["predicted_s"]) / 2, cache / rates.memory_bytes_s)
            chunks = math.ceil(config.train.prompts_per_step / num_gpus / prompts)
            rollout_s = chunks * (few["predicted_s"] + (tokens.completion - 2) * per_token)
    row = range(num_gpus // config.train.replicate)  # of ranks that have all weights together
    push_s = rates.collective_seconds(width * size.params, row)
    seconds |= {"rollout_s": rollout_s, "push_s": push_s}
    work = (seconds["rollout_s"], seconds["update_s"])
    seconds["step_s"] = push_s + (max(work) if config.rollout.max_policy_lag else sum(work))
    seconds["run_h"] = seconds["step_s"] * config.train.num_steps / 3600
    return Measured(_gb(phases), _learner(reports, sizes, load, update, peak.num_bytes), seconds, rates)


def _with_moments(peak: Peak, config: Config) -> Peak:
    """With moments of the size that `optimizer.name` gives them."""
    if config.optimizer.name == "adamw":
        return peak
    kinds = peak.kinds | {"moments": round(peak.kinds.get("moments", 0) * MOMENT_BYTES / 8)}
    return replace(peak, kinds=kinds, num_bytes=sum(kinds.values()))


def _learner(
    reports: Mapping[tuple[str, Size], Mapping[str, Any]],
    sizes: list[Size],
    load: Mapping[str, Any],
    update: Mapping[str, Any],
    peak_bytes: int,
) -> dict[str, float]:
    """Counts of one update on one GPU."""
    deeper = next(size for size in sizes if size[0] != SMALL[0])
    launches = [reports["learner", size]["updates"][1]["launches"] for size in (SMALL, deeper)]
    flop = update["gemm_flop"] + update["attention_flop"]
    return {
        "syncs": sum(update["syncs"].values()),
        "blocking_copies": sum(update["blocking_copies"].values()),
        "launches": update["launches"],
        "launches_per_decoder_layer": (launches[1] - launches[0]) / (deeper[0] - SMALL[0]),
        "collectives": update["collectives"],
        "tflop": round(flop / 1e12, 1),
        "elementwise_gb": round(update["moved_bytes"] / 1e9, 1),
        "peak_gb": round(peak_bytes / 1e9, 2),
        "load_peak_gb": round(peak_of(load).num_bytes / 1e9, 2),
    }


def _gb(phases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        phase: {kind: round(num_bytes / 1e9, 2) for kind, num_bytes in kinds.items() if num_bytes > 5e6}
        for phase, kinds in phases.items()
    }
