"""A whole GRPO run with SGLang beside the same one with the local engine: the steps of `make demo`.

In the middle of it the worker is killed. Both runs are started by the command line, as a user does. Where the
demo has just been run, $VCR1_DEMO names the file of its output, and it is not run again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.sglang.parity import check_gaps
from vcr1_fast.commands import demo
from vcr1_fast.settings.io import config_to_yaml
from vcr1_fast.synth.dataset import write_dataset

NUM_STEPS = demo.NUM_STEPS
KILL_AFTER_STEP = 15
LIMIT_S = 1500  # on two quiet cores 140 s; ten times that where others work beside
MIN_GAIN = 0.05
# The local engine's held-out mIoU rose from 0.491 to 0.862, 0.880, 0.905, 0.881 and 0.870 with seeds 0 to 4: standard
# deviation 0.016, so that two runs that draw differently are 0.023 apart. Three times that is allowed.
MAX_APART = 0.07


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    result: dict[str, Any]  # its last line
    steps: list[dict[str, float]]
    errors: str  # what it wrote to stderr

    def miou(self, when: str) -> float:
        return self.result[when]["temporal_grounding"]["metrics"]["miou"]


@pytest.fixture(scope="module")
def run_demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """run_demo(name, "--a.b=c", ..., watch=...): trains; `watch(process, steps so far)` is called again and again."""
    folder = tmp_path_factory.mktemp("demo")
    synth, config = demo.settings(folder, seed=0)
    write_dataset(synth, show_progress=False)
    settings = folder / "settings.yaml"
    settings.write_text(config_to_yaml(config), encoding="utf-8")

    def run(name: str, *overrides: str, watch: Callable[[int, int], None] | None = None) -> Outcome:
        command = [sys.executable, "-m", "vcr1_fast", "train", str(settings), f"--train.output_dir={folder / name}"]
        command += [f"--train.num_steps={NUM_STEPS}", "--checkpoint.export=false", *overrides]
        output, errors = folder / f"{name}.out", folder / f"{name}.err"
        deadline = time.monotonic() + LIMIT_S
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            try:
                while process.poll() is None:
                    assert time.monotonic() < deadline, f"{name} took longer than {LIMIT_S} s"
                    if watch is not None:
                        watch(process.pid, len(steps_of(folder / name)))
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
        assert process.returncode == 0, errors.read_text()[-3000:]
        result = json.loads(output.read_text().splitlines()[-1])
        return Outcome(result, steps_of(folder / name), errors.read_text())

    return run


def steps_of(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [record for line in lines if line.endswith("\n") and "loss" in (record := json.loads(line))]


def workers_of(trainer: int) -> list[int]:
    """Process ids of the SGLang workers that a trainer has started."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{trainer}/task").glob("*/children"))
    return [pid for pid in map(int, children.split()) if b"sgl.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def local(run_demo) -> dict[str, float]:
    """Held-out mIoU before and after, with the local engine."""
    output = os.environ.get("VCR1_DEMO")
    if output:
        return json.loads(Path(output).read_text(encoding="utf-8").splitlines()[-1])["tasks"]["temporal_grounding"]
    outcome = run_demo("local")
    return {when: outcome.miou(when) for when in ("before", "after")}


@pytest.fixture(scope="module")
def killed(run_demo, sglang_python: str) -> tuple[Outcome, list[int]]:
    """With SGLang, and the workers that were killed."""
    pids: list[int] = []

    def kill(trainer: int, num_steps: int) -> None:
        if num_steps >= KILL_AFTER_STEP and not pids:
            pids.extend(workers_of(trainer))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    options = ("--rollout.engine=sglang", f"--rollout.sglang.python={sglang_python}")
    options += ("--rollout.sglang.backoff_s=0.1",)
    return run_demo("sglang", *options, watch=kill), pids


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_held_out_score_rises_as_with_the_local_engine(local, killed):
    sglang, _ = killed
    assert sglang.miou("before") == pytest.approx(local["before"], abs=1e-3)  # greedy answers of one model
    assert sglang.miou("after") - sglang.miou("before") > MIN_GAIN
    assert local["after"] - local["before"] > MIN_GAIN
    assert abs(sglang.miou("after") - local["after"]) < MAX_APART


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_engine_has_the_learners_log_probs_at_every_step(killed):
    """Weights that were not synced would be seen: each update moves the log-probs by a thousand times the bound."""
    sglang, _ = killed
    assert [step["step"] for step in sglang.steps] == list(range(1, NUM_STEPS + 1))
    check_gaps(sglang.steps)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_worker_killed_in_mid_run_is_replaced_once(killed):
    sglang, pids = killed
    assert len(pids) == 1
    assert sglang.errors.count("is started again") == 1, sglang.errors[-3000:]
    assert len(sglang.steps) == NUM_STEPS
    assert [step["engine/restarts"] for step in sglang.steps][-1] == 1.0
    assert sglang.result["engine"].startswith("sglang 0.5.")
