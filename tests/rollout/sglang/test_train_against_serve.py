"""`vcr1-fast train` on two ranks against `vcr1-fast serve` with two workers, of which one is killed in mid-run.

Both are started as a user does, and the trainer is told what serve prints. LoRA adapters are trained, and after the
first time they travel alone; answers are drawn one step ahead.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rollout.sglang.parity import check_gaps
from tests.rollout.sglang.test_whole_run import steps_of, workers_of
from vcr1_fast.rollout.rollout_key import VARIABLE
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

NUM_STEPS = 4
KILL_AFTER_STEP = 2
LIMIT_S = 600  # on two quiet cores 50 s
# One update moves log-probs by less than the bound (with 2e-4 by up to 0.07), so that what is seen of answers that
# older weights drew is what engine and wire make of them.
LEARNING_RATE = 1e-8


@dataclass(frozen=True)
class Served:
    """A running `vcr1-fast serve`."""

    pid: int
    options: list[str]  # what it tells a trainer to say
    key_file: Path
    environment: dict[str, str]


@pytest.fixture
def served(sglang_python: str, tmp_path: Path) -> Iterator[Served]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | {"OMP_NUM_THREADS": "1"}
    key_file = tmp_path / "rollout.key"
    command = [sys.executable, "-m", "vcr1_fast", "serve", "tiny", "--bind=127.0.0.1:0", "--workers=2"]
    command += [f"--logs={tmp_path / 'logs'}", f"--rollout.sglang.key_file={key_file}"]
    command += [f"--rollout.sglang.python={sglang_python}"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        told = [process.stdout.readline()]
        while "waiting for trainers" not in told[-1]:
            told.append(process.stdout.readline())
            assert told[-1], f"serve ended: {told}"
        [line] = [line for line in told if line.startswith("trainer: ")]
        yield Served(process.pid, shlex.split(line.removeprefix("trainer: ")), key_file, environment)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def train_command(served: Served, folder: Path) -> list[str]:
    clips = SynthConfig(output_dir=str(folder / "data"), num_train=8, num_eval=1, kinds=("grounding",))
    write_dataset(clips, show_progress=False)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "vcr1_fast", "train", "tiny", *served.options, f"--rollout.sglang.key_file={served.key_file}"),
        *("--rollout.sglang.weights=broadcast", "--model.lora.rank=4"),
        *("--rollout.sglang.backoff_s=0.1", "--rollout.max_policy_lag=1", "--rollout.group_size=4"),
        *(f"--data.train=[{folder / 'data' / 'train_grounding.jsonl'}]", "--data.eval=[]", "--video.num_workers=1"),
        *(f"--train.output_dir={folder / 'run'}", f"--train.num_steps={NUM_STEPS}", "--train.prompts_per_step=4"),
        *(f"--optimizer.learning_rate={LEARNING_RATE}", "--checkpoint.export=false"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_a_run_on_two_ranks_outlives_one_of_its_workers(served, tmp_path):
    command, killed = train_command(served, tmp_path), []
    output, errors = tmp_path / "output", tmp_path / "errors"
    deadline = time.monotonic() + LIMIT_S
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=served.environment)
        try:
            while process.poll() is None:
                assert time.monotonic() < deadline, f"it took longer than {LIMIT_S} s"
                if not killed and len(steps_of(tmp_path / "run")) >= KILL_AFTER_STEP:
                    killed = workers_of(served.pid)[1:]
                    os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.05)
        finally:
            process.terminate()  # torchrun ends its ranks
            process.wait()
    assert process.returncode == 0, errors.read_text()[-3000:]
    result = json.loads(output.read_text().splitlines()[-1])
    assert result["steps"] == NUM_STEPS and result["engine"].startswith("sglang 0.5.")
    assert errors.read_text().count("is started again") == 1

    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert [step["sampling/policy_lag/max"] for step in steps] == [0.0] + [1.0] * (NUM_STEPS - 1)
    check_gaps(steps)
    restarts = [step["engine/restarts"] for step in steps]
    assert restarts[:KILL_AFTER_STEP] == [0.0] * KILL_AFTER_STEP and restarts[-1] == 1.0
