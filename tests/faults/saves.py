"""Saving and loading alone, thousands of times: kill -9 at each operation of a save, and flipped bits in each file.

The same functions as a run's, with a model of 40 thousand weights: 30 ms a trial.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from tests.faults import damage, file_operations
from tests.faults.runs import Ended, forked
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs, steps_with_checkpoints
from tests.run.sharded_checkpoint import CONFIG, whole_state
from tests.tiny_policy import TinyPolicy
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.checkpoint_files import resolve_resume
from vcr1_fast.run.folder import prepare_output_dir
from vcr1_fast.run.random_state import rng_state
from vcr1_fast.settings.config import ConfigError

NUM_STEPS = 3


class Saving:
    """The state of a run after each of three steps, by digest, and its checkpoints of the first two."""

    def __init__(self, folder: Path) -> None:
        self.run = prepare_output_dir(folder)
        self.digests: dict[int, str] = {}
        self.parts = make_parts(seed=0)
        for step in range(1, NUM_STEPS + 1):
            self._update(step)
            self.digests[step] = digest(self.parts, state(step))
            if step < NUM_STEPS:
                self.save(self.run, step)

    def save(self, run: Path, step: int, keep: int = 3) -> None:
        seed_generators(step)
        save_checkpoint(run, *self.parts, state(step), SINGLE_PROCESS, keep)

    def _update(self, step: int) -> None:
        """A step of AdamW on random gradients; no backward pass, which would start threads before the forks."""
        policy, optimizer, schedule = self.parts
        generator = torch.Generator().manual_seed(step)
        for weight in policy.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        schedule.step()
        seed_generators(step)


def seed_generators(step: int) -> None:
    random.seed(step)
    np.random.seed(step)
    torch.manual_seed(step)


@functools.cache
def saving(runs: Runs) -> Saving:
    logging.disable(logging.NOTSET)
    return Saving(runs.folder / "saving")


def make_parts(seed: int):
    policy = TinyPolicy(seed=seed)
    optimizer = build_optimizer(policy, CONFIG)
    return policy, optimizer, build_schedule(optimizer, CONFIG, 10)


def state(step: int) -> RunState:
    answers = {"ids": torch.arange(100) * step}
    pending = [{"step": step + 1, "position": 10 * step}]
    scale = {"temporal_grounding": [0.1 * step, 0.2 * step]}
    made = RunState(step, 10 * step, 100 * step, step + 1, "pyav 18.1", "a: 1\n", "base", "train", scale)
    return replace(made, pending=pending, answers=answers)


def digest(parts, run_state: RunState) -> str:
    """Of everything that a checkpoint holds."""
    policy, optimizer, schedule = parts
    tensors = {**whole_state(policy, optimizer), **{f"rng {k}": v for k, v in rng_state().items()}}
    tensors |= {f"answer {k}": v for k, v in run_state.answers.items()}
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    facts = {**asdict(replace(run_state, answers={})), "num_updates": schedule.last_epoch}
    whole.update(json.dumps(facts, sort_keys=True, default=list).encode())
    return whole.hexdigest()


def kill_in_a_save(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """Of a new step, or of one that is there already, with all kept or all but the newest deleted."""
    lab, folder = saving(runs), bench.empty_folder()
    run = shutil.copytree(lab.run, folder / "run")
    keep, again = rng.choice([1, 3]), rng.random() < 0.3
    if again:  # the step that is there is replaced by itself
        lab.save(run, NUM_STEPS)
    at = rng.randint(1, _num_operations(runs, keep, again))
    bench.fault = f"kill -9 at operation {at} of a save of step {NUM_STEPS}{' again' if again else ''}, keep={keep}"

    def save() -> None:
        file_operations.arm(run, at, file_operations.KILL)
        lab.save(run, NUM_STEPS, keep)

    ended = forked(save, folder / "killed").checked()
    newest = max(steps_with_checkpoints(run), default=0)
    step = _load(lab, run, folder / "loaded")
    if ended.code == 0:
        raise LostError("nothing was killed")
    if step < max(newest, NUM_STEPS if again else NUM_STEPS - 1):
        raise LostError(f"after the kill step {step} was loaded, though step {max(newest, NUM_STEPS - 1)} was saved")


@functools.cache
def _num_operations(runs: Runs, keep: int, again: bool) -> int:
    lab, folder = saving(runs), runs.folder / "counting"
    shutil.rmtree(folder, ignore_errors=True)
    run = shutil.copytree(lab.run, folder / "run")
    if again:
        lab.save(run, NUM_STEPS)
    counted = folder / "operations"

    def save() -> None:
        file_operations.arm(run, 0, file_operations.COUNT)
        lab.save(run, NUM_STEPS, keep)
        counted.write_text(str(file_operations.count()))

    forked(save, folder / "log").checked()
    return int(counted.read_text())


def damage_a_checkpoint(bench: Bench, runs: Runs, rng: random.Random) -> None:
    """One bit, one block or one file of the newest checkpoint, or of the one before it, which must then not matter."""
    lab, folder = saving(runs), bench.empty_folder()
    run = shutil.copytree(lab.run, folder / "run")
    victim = run / "checkpoints" / f"step_{rng.choice([1, 2, 2, 2]):06d}"
    bench.fault = damage.damage_a_file(rng, victim)
    step = _load(lab, run, folder / "loaded")
    if step == 0:
        raise LostError("it began anew, though the other checkpoint is good")


def _load(lab: Saving, run: Path, log: Path) -> int:
    """The step that a start finds; 0 for none, -1 for a refusal. Raises LostError when it loads other bits."""
    result = log.with_suffix(".json")

    def load() -> None:
        prepare_output_dir(run)
        parts = make_parts(seed=9)
        try:
            found = resolve_resume("auto", run)
            loaded = load_checkpoint(found, *parts, SINGLE_PROCESS) if found is not None else None
        except ConfigError as error:
            result.write_text(json.dumps({"step": -1, "refused": str(error)}))
            return
        step = loaded.step if loaded is not None else 0
        result.write_text(json.dumps({"step": step, "digest": digest(parts, loaded) if loaded is not None else ""}))

    ended: Ended = forked(load, log).checked()
    if ended.code != 0:
        raise LostError(f"loading ended with {ended.code}: {ended.err[-300:]}")
    got = json.loads(result.read_text())
    if got["step"] < 0:
        return _refused(got["refused"])
    if got["step"] and lab.digests[got["step"]] != got["digest"]:
        raise LostError(f"step {got['step']} was loaded with other bits than were saved, without a word")
    return got["step"]


def _refused(message: str) -> int:
    if "\n" in message.strip():
        raise LostError(f"a refusal of several lines: {message!r:.200}")
    return -1
