"""The runs that faults are done to, what they leave when nobody disturbs them, and the comparison with that.

Four steps of two prompts each on a model of 1 M parameters, a checkpoint after each step: 1 to 2 s.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import file_operations
from tests.faults.runs import Ended, Started, run
from tests.faults.trials import LostError
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

NUM_STEPS = 4
VARIANTS: dict[str, tuple[str, ...]] = {
    "train": ("--rollout.max_policy_lag=0",),
    "lag": (
        "--rollout.max_policy_lag=1",
        "--algorithm.sampling_correction=token_truncate",
        "--algorithm.sampling_cap=2.0",
    ),
    "lora": ("--model.lora.rank=4", "--checkpoint.keep=1"),
    "sft": (),
}
_COMPARED = re.compile(
    r"step|loss|nll|reward.*|rewards/.*|grad_norm|entropy|kl|completions/.*|num_tokens|epoch.*|sampling/.*|bad_samples"
    r"|clip_ratio/.*|learning_rate|lr|eval/.*"
)


@dataclass(frozen=True)
class Left:
    """What a run left that must be the same, however often it was disturbed."""

    weights: str  # digest of model.safetensors
    steps: dict[int, dict[str, Any]]  # what metrics.jsonl says of each
    scores: dict[str, Any]  # of the line that the command prints last
    rewards: list[str]  # lines of rewards.jsonl


@dataclass(frozen=True)
class Undisturbed:
    """A variant's run to its end, its folder after three of four steps, and how long it took."""

    variant: str
    left: Left
    after_three: Path
    seconds: float
    num_operations: int  # on files below its folder


@dataclass(frozen=True)
class Runs:
    """Command lines for one data set, and the undisturbed runs, each made at first use."""

    folder: Path
    variants: tuple[str, ...]

    @functools.cached_property
    def data(self) -> Path:
        folder = self.folder / "data"
        kinds = ("grounding",)
        made = SynthConfig(output_dir=str(folder), num_train=8, num_eval=2, kinds=kinds, duration_s=4.0)
        write_dataset(made, show_progress=False)
        return folder

    def arguments(self, variant: str, folder: Path, *overrides: str, data: Path | None = None) -> list[str]:
        program = "sft" if variant == "sft" else "train"
        data = data or self.data
        return [
            *(program, "tiny", "--model.path=tiny", f"--data.train=[{data}/train_grounding.jsonl]"),
            *(f"--data.eval=[{data}/eval_grounding.jsonl]", f"--train.output_dir={folder}", "--video.num_workers=0"),
            *("--train.prompts_per_step=2", "--rollout.group_size=3", "--rollout.max_new_tokens=12"),
            *(f"--train.num_steps={NUM_STEPS}", f"--sft.num_steps={NUM_STEPS}", "--sft.examples_per_step=2"),
            *("--checkpoint.every=1", "--checkpoint.keep=3", "--video.max_frames=4"),
            *("--video.min_frame_pixels=784", "--video.max_frame_pixels=784"),
            "--task.rewards.temporal_grounding=[tests.faults.rewards:letters]",
            *VARIANTS.get(variant, ()),
            *overrides,
        ]

    def undisturbed(self, variant: str) -> Undisturbed:
        return _undisturbed(self, variant)


@functools.cache
def _undisturbed(runs: Runs, variant: str) -> Undisturbed:
    folder = runs.folder / "undisturbed" / variant
    folder.mkdir(parents=True)
    whole, after_three, counted = folder / "whole", folder / "after_three", folder / "operations"

    started = Started(runs.arguments(variant, whole), folder / "whole_log", counting(whole, counted))
    ended = started.wait().checked()
    if ended.code != 0:
        raise RuntimeError(f"the undisturbed run {variant} ended with {ended.code}: {ended.err[-2000:]}")
    seconds = time.monotonic() - started.began
    left = what_is_left(whole, ended)
    killed = Started(runs.arguments(variant, after_three), folder / "after_three_log")
    if not killed.until(lambda: (after_three / "checkpoints" / "step_000003").exists()):
        raise RuntimeError(f"the run {variant} has no checkpoint of step 3: {killed.text()[-2000:]}")
    killed.kill()
    if (after_three / "checkpoints" / "step_000004").exists():
        raise RuntimeError("the run could not be killed before its fourth checkpoint")
    if len({step.get("loss", step.get("nll")) for step in left.steps.values()}) != NUM_STEPS:
        raise RuntimeError(f"steps of {variant} do not differ: {left.steps}")
    num_operations = int(counted.read_text()) if counted.exists() else 0
    return Undisturbed(variant, left, after_three, seconds, num_operations)


def counting(folder: Path, counted: Path) -> Callable[[], None]:
    """For a run's process: how often it did something to files below `folder` is written into `counted` at its end."""

    def count() -> None:
        if file_operations.is_loaded():
            file_operations.arm(folder, 0, file_operations.COUNT)
            atexit.register(lambda: counted.write_text(str(file_operations.count())))

    return count


def what_is_left(folder: Path, ended: Ended) -> Left:
    """Raises LostError when a file is missing or cannot be read."""
    try:
        with (folder / "model" / "model.safetensors").open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        records = [line for line in lines if "loss" in line or "nll" in line]
        numbers = [record["step"] for record in records]
        if numbers != list(range(1, NUM_STEPS + 1)):
            raise LostError(f"metrics.jsonl has the steps {numbers}")
        steps = {r["step"]: {k: v for k, v in r.items() if _COMPARED.fullmatch(k)} for r in records}
        result = json.loads(ended.out.splitlines()[-1])
        path = folder / "rewards.jsonl"
        rewards = sorted(path.read_text().splitlines()) if path.exists() else []
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise LostError(f"after a run that ended with 0: {type(error).__name__}: {error}") from error
    return Left(weights, steps, {name: result.get(name) for name in ("before", "after", "scores")}, rewards)


def check_same(got: Left, want: Left) -> None:
    """Raises LostError that names what differs from the undisturbed run."""
    for step, metrics in want.steps.items():
        for name, value in metrics.items():
            if got.steps[step].get(name) != value:
                raise LostError(f"step {step}: {name} is {got.steps[step].get(name)}, undisturbed {value}")
    if got.weights != want.weights:
        raise LostError("the exported weights are other ones than those of the undisturbed run")
    for name, value in want.scores.items():
        if got.scores[name] != value:
            raise LostError(f"the scores {name!r} are {got.scores[name]!s:.80}, undisturbed {value!s:.80}")
    if got.rewards != want.rewards:
        raise LostError(
            f"rewards.jsonl has {len(got.rewards)} lines, other ones than the {len(want.rewards)} undisturbed"
        )


def steps_with_checkpoints(folder: Path) -> list[int]:
    """Those under their final names."""
    names = [path.name for path in (folder / "checkpoints").glob("step_*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name))


def resumed_step(ended: Ended) -> int:
    """Where a run says that it went on; 0 where it began anew."""
    found = re.findall(r"resumed from .*step_0*(\d+)", ended.out)
    return int(found[-1]) if found else 0


def check_goes_on(
    runs: Runs, variant: str, folder: Path, log: Path, *, at_least: int | None = None, data: Path | None = None
) -> None:
    """Start the run of `folder` again. It must go on where it was and end with the bits of the undisturbed run.

    `at_least`: the step that it must go on from; default: that of the newest folder in checkpoints/.
    """
    wanted = max(steps_with_checkpoints(folder), default=0) if at_least is None else at_least
    ended = run(runs.arguments(variant, folder, data=data), log).checked()
    if ended.code != 0:
        raise LostError(f"the run cannot be resumed: {ended.refusal()}")
    if resumed_step(ended) < wanted:
        raise LostError(f"it went on from step {resumed_step(ended)}, though step {wanted} was saved")
    check_same(what_is_left(folder, ended), runs.undisturbed(variant).left)
    if stale := [
        path.name for path in (*folder.iterdir(), *(folder / "checkpoints").iterdir()) if ".tmp-" in path.name
    ]:
        raise LostError(f"left for ever: {', '.join(stale)}")


def check_is_refused_or_same(runs: Runs, variant: str, folder: Path, ended: Ended) -> None:
    """A start after damage: either one clear line, or everything as in the undisturbed run."""
    if ended.checked().code != 0:
        ended.refusal()
        return
    check_same(what_is_left(folder, ended), runs.undisturbed(variant).left)
