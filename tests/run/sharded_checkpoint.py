"""Run by test_checkpoint on each rank. Argument: a run folder that holds one checkpoint saved by one process.

Loads that checkpoint on two ranks, trains one update, saves, and exports. Rank 0 leaves what it had in
`want.safetensors`.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import vcr1_fast.run.checkpoint as checkpoint
from tests.tiny_policy import TinyPolicy, tokens
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule
from vcr1_fast.learner.sharding import World, exit_rank, init_distributed, named_weights, shard, shutdown, whole_tensor
from vcr1_fast.run import export
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.checkpoint_files import latest_checkpoint
from vcr1_fast.run.export import export_hugging_face, plan_export
from vcr1_fast.run.folder import prepare_output_dir
from vcr1_fast.run.saver import CheckpointSaver
from vcr1_fast.run.stop_signals import StoppedBySignal
from vcr1_fast.run.stopping import Stopping
from vcr1_fast.settings.config import CheckpointConfig, ConfigError, OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=1e-2, schedule="linear")


def whole_state(policy: TinyPolicy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {}
    for name, weight in named_weights(policy).items():
        state[name] = whole_tensor(weight).clone()
        for moment, value in optimizer.state.get(weight, {}).items():
            state[f"{moment} {name}"] = whole_tensor(value).clone()
    return state


def check_failure_on_one_rank(run: Path, parts: tuple, world: World) -> None:
    """Rank 1 cannot write: both ranks raise, and neither waits for the other."""
    original = checkpoint.rng_state
    if world.rank == 1:

        def fail() -> dict[str, torch.Tensor]:
            raise PermissionError("no space for rank 1")

        checkpoint.rng_state = fail
    try:
        save_checkpoint(run, *parts, RunState(9, 0, 0, 0, "", ""), world, 2)
    except OSError as error:
        assert ("no space for rank 1" if world.rank else "rank 1 failed while saving") in str(error)
    else:
        raise AssertionError("the failure of rank 1 was not seen")
    checkpoint.rng_state = original
    latest = latest_checkpoint(run, world)
    assert latest is not None and latest.name == "step_000002"
    try:
        prepare_output_dir("/proc/nothing/run", world)
    except OSError as error:
        assert "cannot be written" in str(error) or "rank 0 failed while preparing" in str(error)
    else:
        raise AssertionError("a folder in /proc was made")


def check_saver(run: Path, parts: tuple, world: World) -> None:
    """Each rank's writer leaves its own files, the first one completes them; one that is killed ends both ranks."""
    state = RunState(4, 40, 400, 5, "pyav 18", "a: 1\n")
    wanted = whole_state(parts[0], parts[1])
    with CheckpointSaver(run, parts, CheckpointConfig(keep=9), world) as saver:
        saver.save(state)
        with torch.no_grad():
            for weight in parts[0].parameters():
                weight.zero_()
        saver.poll(wait=True)
        saver.save(replace(state, step=5))
    load_checkpoint(run / "checkpoints" / "step_000005", *parts, world)
    assert not any(whole_tensor(weight).any() for weight in parts[0].parameters())
    load_checkpoint(run / "checkpoints" / "step_000004", *parts, world)
    loaded = whole_state(parts[0], parts[1])
    assert all(torch.equal(wanted[name], loaded[name]) for name in wanted)
    assert not list((run / "checkpoints" / "step_000004").glob("rank*"))
    try:
        with CheckpointSaver(run, parts, CheckpointConfig(keep=9), world) as saver:
            if world.rank == 1 and saver._writer is not None:
                os.kill(saver._writer.process.pid, signal.SIGSTOP)
            saver.save(replace(state, step=6))
            if world.rank == 1 and saver._writer is not None:
                os.kill(saver._writer.process.pid, signal.SIGKILL)
    except OSError as error:
        assert ("ended with signal 9" if world.rank else "rank 1 failed while writing") in str(error)
    else:
        raise AssertionError("the death of rank 1's writer was not seen")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert not world.is_main or left[-1] == "step_000005"  # the first rank has removed the rest


def check_stop_is_agreed_on(world: World) -> None:
    """A signal that reaches one rank ends the run on both after the same step."""
    try:
        with Stopping(CheckpointConfig(every=0), 9, world) as stopping:
            for step in range(1, 10):
                if world.rank == 1 and step == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    while not stopping._signals.signum:
                        time.sleep(0.005)
                assert stopping.wants_checkpoint(step) == (step == 3)
                stopping.end_if_asked(step)
    except StoppedBySignal as ended:
        assert ended.signum == signal.SIGUSR1 and "after step 3" in str(ended)
    else:
        raise AssertionError("the signal was not seen")


def check_failed_export(run: Path, policy: TinyPolicy, world: World) -> None:
    """Only rank 0 writes, but all ranks are told, and none is left in a gather."""
    if world.is_main:
        (run / "photos").mkdir()
    try:
        export_hugging_face(policy, plan_export(run / "start", run / "photos"), world)
    except OSError as error:
        assert "has no config.json" in str(error) if world.is_main else "rank 0 failed" in str(error)
    else:
        raise AssertionError("a folder of something else was replaced")


def main() -> None:
    run, world = Path(sys.argv[1]), init_distributed("cpu")
    policy = TinyPolicy(seed=5)
    shard(policy, world, torch.float32)
    optimizer = build_optimizer(policy, CONFIG)
    schedule = build_schedule(optimizer, CONFIG, 10)
    random.seed(100 + world.rank)
    before_load = random.getstate()
    parts = (policy, optimizer, schedule)
    assert load_checkpoint(run / "checkpoints" / "step_000002", *parts, world).step == 2
    # Saved by one rank: rank 0 continues its random numbers, rank 1 keeps its own.
    assert (random.getstate() == before_load) == (world.rank == 1)
    other = TinyPolicy()
    other.hf.lm_head = torch.nn.Linear(32, 66, bias=False)
    try:
        load_checkpoint(run / "checkpoints" / "step_000002", other, None, None, world)
    except ConfigError:
        pass
    else:
        raise AssertionError("a checkpoint of another shape was loaded")
    loaded = whole_state(policy, optimizer)
    policy(tokens(world.rank)).backward()
    optimizer.step()
    schedule.step()
    check_failure_on_one_rank(run, parts, world)
    save_checkpoint(run, *parts, RunState(3, 30, 300, 4, "pyav 18", "a: 1\n"), world, keep=2)
    wanted = whole_state(policy, optimizer)
    draw = random.random()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
    optimizer.state.clear()
    load_checkpoint(run / "checkpoints" / "step_000003", *parts, world)
    again = whole_state(policy, optimizer)
    assert wanted.keys() == again.keys()
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    assert random.random() == draw  # each rank continues its own
    check_saver(run, parts, world)
    check_stop_is_agreed_on(world)
    check_failed_export(run, policy, world)
    export.FILE_BYTES = 60_000  # of 200 KB: several files, as a 7B model has
    export_hugging_face(policy, plan_export(run / "start", run / "model"), world)
    if world.is_main:
        both = {f"loaded {name}": t for name, t in loaded.items()} | {f"saved {name}": t for name, t in wanted.items()}
        save_file(both, run / "want.safetensors")
    shutdown(world)
    exit_rank(0)


if __name__ == "__main__":
    main()
