"""`python -m bench step`: one policy update on the same groups, the original's way and ours, in one run.

Before anything is timed, loss and all gradients are compared: on a small group with a plain update in higher precision
(each way may be at most twice as far off as the plain one), on every timed group with the plain update. Then the ways
take turns. Times are forward, backward, clipping and AdamW (learning rate 0, so that all meet the same weights).

On a CPU the packaged tiny model is updated, on a GPU Qwen2.5-VL-3B with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import Any, cast

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench import step_model as models
from bench.floors import Limits, measure_limits
from bench.flops import activation_bytes, checkpoint_bytes
from bench.harness import Deadline, Findings, free_memory, reason_of, summarize
from bench.harness import disagreements as failed  # noqa: F401  # asked by bench/__main__.py
from bench.step_model import StepPoint
from bench.step_report import COLUMN_HEADS as COLUMN_HEADS
from bench.step_report import print_step_report
from bench.step_timing import (
    PARTS,
    UpdateTime,
    drop_gradients,
    gradient_difference,
    predicted_parts_ms,
    run_update,
    still_optimizer,
    take_gradients,
    update_with_peak,
    warm_up,
)
from bench.step_ways import WAY_NAMES, LossCall, WayName, WayOptions, count_flop, count_tokens, losses
from vcr1_fast.types import RolloutGroup

CPU_WARNING = "CPU run: the tiny model. Ratios show the saving of work; absolute times mean nothing for a GPU."
MAX_ROUNDS = 5
FIRST_RATE = 0.4  # share of the GEMM rate that the first point is budgeted at
CHECK_FACTOR = 2.0  # a way's error may be this many times the plain way's own
POINT_FACTOR = 5.0  # and its distance from the plain way on a timed group this many times the plain way's checked error
FLOAT32_NOISE = 2e-5  # below this, differences are the order of summation
Row = dict[str, Any]


@dataclass
class Runner:
    """One way on one group with the options that fit."""

    name: WayName
    label: str
    options: WayOptions
    loss: float = math.nan
    peak_bytes: int | None = None
    difference: float = math.nan
    times: list[UpdateTime] = field(default_factory=list)


@dataclass
class Session(Findings):
    hf: Qwen2_5_VLForConditionalGeneration
    limits: Limits
    rates: dict[str, float] = field(default_factory=dict)  # way -> share of the GEMM rate it reached, all FLOPs counted
    checked: dict[str, float] = field(default_factory=dict)  # way -> gradient error on the check group

    def calls(self, runner: Runner, group: RolloutGroup) -> Iterator[LossCall]:
        return losses(runner.name, self.hf, group, runner.options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small group, one timed round: does it run?")
    parser.add_argument("--seconds", type=float, default=None, help="budget; what does not fit is named as left out")
    parser.add_argument("--rounds", type=int, default=MAX_ROUNDS, help="at most this many timed updates of each way")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, then all points that fit the budget; returns what the JSON line holds.

    Raises SystemExit after the report when a way's loss or gradient is out of bounds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda, is_quick = device.type == "cuda", bool(arguments.quick)
    if not is_cuda:
        print(CPU_WARNING, flush=True)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    seconds = arguments.seconds or (30.0 if is_quick else 240.0 if is_cuda else 180.0)
    limits = measure_limits(device, dtype)
    name, check, points = (
        ("3B", models.GPU_CHECK, models.GPU_POINTS) if is_cuda else ("tiny", models.TINY_CHECK, models.TINY_POINTS)
    )
    session = Session(models.load_model(name, dtype, device), limits, deadline=Deadline(seconds))
    check_gradients(session, check)
    with session.deadline.until_stopped():
        measure_points(session, [check] if is_quick else points, 1 if is_quick else arguments.rounds)
    result = {
        "is_gpu": is_cuda,
        "warning": None if is_cuda else CPU_WARNING,
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "limits": limits.as_json(),
        "check": {"size": check.name, "gradient_errors": session.checked},
        **session.as_json(),
    }
    print_step_report(result)
    return result


def check_gradients(session: Session, point: StepPoint) -> None:
    """Gradients of every way on a small group against the plain way in higher precision."""
    hf, device = session.hf, session.hf.device
    wide_dtype = torch.float32 if hf.dtype == torch.bfloat16 else torch.float64
    options = WayOptions(point.num_completions, gradient_checkpointing=False)
    wide: Any = copy.deepcopy(hf)
    wide.to(wide_dtype)
    wide.model.visual.config._attn_implementation = "sdpa"  # flash attention has no float32
    group = point.group(hf.config.video_token_id, device, wide_dtype)
    wide_loss, _ = run_update(wide, None, losses("plain", wide, group, options))
    expected = take_gradients(wide)
    del wide
    group = point.group(hf.config.video_token_id, device, hf.dtype)
    loss_errors = {}
    for name in WAY_NAMES:
        loss, _ = run_update(hf, None, losses(name, hf, group, options))
        session.checked[name] = gradient_difference(hf, expected)
        loss_errors[name] = abs(loss - wide_loss)
        drop_gradients(hf)
    del expected
    free_memory(device)
    bound = CHECK_FACTOR * session.checked["plain"] + FLOAT32_NOISE
    loss_bound = 1e-3 * abs(wide_loss) + 1e-5
    for name in ("packing", "kernels"):  # `original` is not ours to hold to a bound: its bfloat16 log-softmax is coarse
        if not session.checked[name] <= bound or not loss_errors[name] <= loss_bound:
            session.disagreements.append(
                f"{name} on {point.name}: gradient off by {session.checked[name]:.2e} (bound {bound:.2e}), loss by "
                f"{loss_errors[name]:.2e} (bound {loss_bound:.2e})"
            )


def attempts(name: WayName, point: StepPoint, hf: Qwen2_5_VLForConditionalGeneration) -> list[WayOptions]:
    """Options from the fastest to the least memory, without those that cannot fit. On a GPU separate rows always use
    checkpointing, as the original did."""
    num_rows, itemsize, config = point.num_completions, hf.dtype.itemsize, cast("Any", hf.config)
    if hf.device.type != "cuda":
        return [WayOptions(num_rows, gradient_checkpointing=False)]
    free = torch.cuda.mem_get_info(hf.device)[0]
    if name in ("original", "plain"):
        row_len = point.prompt_len + point.completion_len
        row_bytes = checkpoint_bytes(config, row_len, point.num_patches, itemsize)
        if name == "original":  # logits, their log-softmax, and the gradient of one of the two
            row_bytes += 3 * itemsize * row_len * config.text_config.vocab_size
        sizes = [num_rows // 2**i for i in range(num_rows.bit_length())]
        return [WayOptions(size, True) for size in sizes if size == 1 or size * row_bytes < free]
    num_tokens = point.prompt_len + num_rows * point.completion_len
    needed = activation_bytes(config, num_tokens, point.num_patches, itemsize)
    options = [WayOptions(num_rows, False), WayOptions(num_rows, True)]
    return options if needed < free else options[1:]


def run_once(session: Session, runner: Runner, group: RolloutGroup, held_bytes: int) -> None:
    """Its loss and peak memory; the gradients stay in place. `held_bytes`: of gradients kept to compare."""
    runner.loss, peak_bytes = update_with_peak(session.hf, session.calls(runner, group))
    runner.peak_bytes = None if peak_bytes is None else peak_bytes - held_bytes


def fit(session: Session, name: WayName, point: StepPoint, group: RolloutGroup, held_bytes: int) -> Runner | None:
    """The first options under which one forward and backward runs; this also warms up. Its gradients stay in place.

    None, with a row in `absent`, when no options fit.
    """
    reason = "no options tried"
    for options in attempts(name, point, session.hf):
        runner = Runner(name, name, options)
        try:
            run_once(session, runner, group, held_bytes)
            return runner
        except RuntimeError as error:  # running out of memory is one of these
            reason = reason_of(error)
        drop_gradients(session.hf)
        free_memory(session.hf.device)
        if reason != "out of memory":
            break
    session.absent.append({"size": point.name, "way": name, "reason": reason})
    return None


def measure_points(session: Session, points: list[StepPoint], max_rounds: int) -> None:
    """All points that fit; an early one repeats less often when a later one needs the time."""
    hf = session.hf
    optimizer = still_optimizer(hf)
    warm_up(hf, optimizer)
    groups = [point.group(hf.config.video_token_id, hf.device, hf.dtype) for point in points]
    for index, (point, group) in enumerate(zip(points, groups, strict=True)):
        if not session.deadline.allows(f"step {point.name}", needed_s(session, point, group)):
            continue
        runners = compared_runners(session, point, group)
        if not runners:
            continue
        for round_index in range(max_rounds):
            last_round_s = sum(runner.times[-1].total_ms for runner in runners if runner.times) / 1e3
            later_s = sum(map(needed_s, repeat(session), points[index + 1 :], groups[index + 1 :]))
            if round_index and session.deadline.left_s() < last_round_s + later_s:
                break
            for runner in runners:
                runner.times.append(run_update(hf, optimizer, session.calls(runner, group))[1])
            note_rates(session, group, runners)
        session.rows += [row_of(session, point, group, runner, runners) for runner in runners]
        free_memory(hf.device)


def note_rates(session: Session, group: RolloutGroup, runners: list[Runner]) -> None:
    for runner in runners:
        executed = count_flop(runner.name, session.hf.config, group, runner.options).executed
        session.rates[runner.name] = session.limits.flop_ms(executed) / runner.times[-1].total_ms


def compared_runners(session: Session, point: StepPoint, group: RolloutGroup) -> list[Runner]:
    """Every way that runs, its gradient compared with the plain way's, in the order of WAY_NAMES."""
    hf = session.hf
    plain = fit(session, "plain", point, group, 0)
    expected = take_gradients(hf) if plain else {}
    held_bytes = sum(grad.nbytes for grad in expected.values())
    runners = [plain] if plain else []
    for name in WAY_NAMES:
        if name == "plain":
            continue
        runner = fit(session, name, point, group, held_bytes)
        if runner is None:
            continue
        runners.append(runner)
        judge(session, point, runner, expected)
        drop_gradients(hf)
        if name == "kernels" and hf.device.type == "cuda" and not runner.options.gradient_checkpointing:
            # sharing saves so much memory that checkpointing can be left out; this row tells its part of the gain
            extra = Runner(name, "kernels, checkpointed", WayOptions(point.num_completions, True))
            run_once(session, extra, group, held_bytes)
            judge(session, point, extra, expected)
            drop_gradients(hf)
            runners.append(extra)
    if plain:
        plain.difference = 0.0
    free_memory(hf.device)
    return sorted(runners, key=lambda runner: WAY_NAMES.index(runner.name))


def judge(session: Session, point: StepPoint, runner: Runner, expected: dict[str, torch.Tensor]) -> None:
    """Distance of the present gradients from the plain way's; one of ours out of bounds is a disagreement."""
    if not expected:  # the plain way did not run; `absent` says so
        return
    runner.difference = gradient_difference(session.hf, expected)
    bound = POINT_FACTOR * session.checked["plain"] + 5 * FLOAT32_NOISE
    if runner.name != "original" and not runner.difference <= bound:
        session.disagreements.append(
            f"{runner.label} on {point.name}: gradient differs from the plain one by {runner.difference:.2e}, "
            f"bound {bound:.2e}"
        )


def needed_s(session: Session, point: StepPoint, group: RolloutGroup) -> float:
    """Two updates of each way, one to compare and one to time, at the rates seen last."""
    hf = session.hf
    options = WayOptions(point.num_completions, gradient_checkpointing=hf.device.type == "cuda")
    total_ms = 0.0
    for name in WAY_NAMES:
        executed = count_flop(name, hf.config, group, options).executed
        total_ms += session.limits.flop_ms(executed) / session.rates.get(name, FIRST_RATE)
    return 2 * total_ms / 1e3


def row_of(session: Session, point: StepPoint, group: RolloutGroup, runner: Runner, runners: list[Runner]) -> Row:
    """Everything that is reported of one way at one point."""
    timing = summarize([time.total_ms for time in runner.times])
    counts = count_tokens(runner.name, group)
    flop = count_flop(runner.name, session.hf.config, group, runner.options)
    parts_ms = {part: summarize([t.parts_ms[part] for t in runner.times]).median_ms for part in PARTS}
    backward_ms = timing.median_ms - parts_ms["optimizer"]
    seconds = timing.median_ms / 1e3
    row = {
        "size": point.name,
        "prompt_tokens": point.prompt_len,
        "completion_tokens": point.completion_len,
        "group_size": point.num_completions,
        "way": runner.label,
        **asdict(runner.options),
        "loss": runner.loss,
        "gradient_difference": runner.difference,
        **timing.as_json(),
        "completions_per_s": point.num_completions / seconds,
        "tokens_per_s_executed": counts.executed / seconds,
        "tokens_per_s_unshared": counts.unshared / seconds,
        "tflop_per_s": flop.step / backward_ms / 1e9,
        "mfu_percent": 100 * session.limits.flop_ms(flop.step) / backward_ms,
        "peak_bytes": runner.peak_bytes,
        "parts_ms": parts_ms,
        "predicted_ms": predicted_parts_ms(flop, session.limits, head_in_forward=runner.name == "kernels"),
    }
    for other in runners:
        if other.label in ("original", "plain"):
            row |= ratios(group, runner, other)
    return row


def ratios(group: RolloutGroup, runner: Runner, other: Runner) -> Row:
    """How many times faster than `other`, beside the ratio of tokens.

    The share of the token ratio is that of forward and backward: the optimizer's time does not depend on tokens.
    """
    medians = [summarize([t.total_ms for t in r.times]).median_ms for r in (other, runner)]
    without = [summarize([t.total_ms - t.parts_ms["optimizer"] for t in r.times]).median_ms for r in (other, runner)]
    tokens = [count_tokens(r.name, group).executed for r in (other, runner)]
    return {
        f"time_ratio_{other.label}": medians[0] / medians[1],
        f"token_ratio_{other.label}": tokens[0] / tokens[1],
        f"share_of_token_ratio_{other.label}": without[0] / without[1] / (tokens[0] / tokens[1]),
    }
