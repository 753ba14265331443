"""Workers that die, hang, fail or lie: the engine around them, with scripted workers in the place of SGLang."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.rollout.sglang import scripted_worker
from tests.rollout.sglang.conftest import SCRIPTED_WEIGHTS, first_ids, pids, wanted
from vcr1_fast.rollout.sgl import process as sglang_process
from vcr1_fast.rollout.sgl.process import WORKER_MODULE
from vcr1_fast.types import SamplingParams

SAMPLING = SamplingParams(3, 4)


def test_the_worker_is_a_process_of_the_named_interpreter(start, prompts, tmp_path, monkeypatch):
    """The one test with a real command: `-m`, the link to our package alone, the key in the environment."""
    monkeypatch.setattr(sglang_process, "subprocess", subprocess)
    python = tmp_path / "python"
    script = Path(scripted_worker.__file__)
    python.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-m {WORKER_MODULE}" ] && exec "{sys.executable}" "{script}" "$3" "$4"\n'
    )
    python.chmod(stat.S_IRWXU)
    engine = start(["ok"], python=str(python))
    answers = engine.generate(prompts, SAMPLING)
    assert pids(answers) == {engine._workers.seats[0].worker.child.pid}


def test_two_workers_share_the_prompts(start, prompts):
    engine = start(["ok"], num_workers=2, max_inflight=2)
    answers = engine.generate(prompts, SAMPLING)
    assert first_ids(answers) == wanted(prompts)
    assert answers[0][0].finish_reason == "stop"
    assert engine.generate([], SAMPLING) == [] and engine.num_restarts == 0
    assert pids(answers) == {seat.worker.child.pid for seat in engine._workers.seats}


@pytest.mark.parametrize("plan", [["die 1", "ok"], ["die 3", "ok"], ["die 3", "die 1", "crash", "ok"]])
def test_a_worker_that_dies_is_replaced_and_its_prompts_answered(start, prompts, plan):
    engine = start(plan)
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    assert engine.num_restarts == len(plan) - 1
    assert engine.policy_version == 1
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)


def test_killed_between_two_calls(start, prompts):
    engine = start(["ok"])
    engine.generate(prompts, SAMPLING)
    os.kill(engine._workers.seats[0].worker.child.pid, signal.SIGKILL)
    engine.load_weights([("model.visual.w", torch.zeros(300, 300))], 2)
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    assert (engine.policy_version, engine.num_restarts) == (2, 1)


@pytest.mark.parametrize("how", ["hang", "stopped"])
def test_a_worker_that_hangs_is_replaced(start, prompts, how):
    engine = start(["hang", "ok"], timeout_s=0.5)
    if how == "stopped":  # not even its connection's thread runs any more
        os.kill(engine._workers.seats[0].worker.child.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    assert engine.num_restarts == 1
    assert time.monotonic() - began < 30


def test_answers_that_are_late_too_often_end_the_call(start, prompts):
    engine = start(["hang"], timeout_s=0.3, max_attempts=2)
    with pytest.raises(RuntimeError, match=r"failed 2 times .*took longer than 0.3 s"):
        engine.generate(prompts[:1], SAMPLING)
    assert engine.num_restarts == 1


def test_failures_end_after_max_attempts(start, prompts):
    engine = start(["fail"], max_attempts=3)
    with pytest.raises(RuntimeError, match=r"failed 3 times .*it was told to"):
        engine.generate(prompts[:1], SAMPLING)


def test_a_refusal_blames_the_prompt(start, prompts):
    engine = start(["refuse"])
    with pytest.raises(ValueError, match="'a is here:0' cannot be answered: it was told to"):
        engine.generate(prompts[:1], SAMPLING)


def test_restarts_end_after_max_restarts(start, prompts):
    engine = start(["die 1"], max_restarts=2)
    with pytest.raises(RuntimeError, match="failed 3 times in a row"):
        engine.generate(prompts, SAMPLING)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("unusable", "no such model"),
        ("crash", "told to crash"),
        ("silent", "within 2 s: nobody listens there"),
    ],
)
def test_a_start_that_fails_says_why(start, how, words):
    with pytest.raises(RuntimeError, match=words):
        start([how], start_timeout_s=2.0 if how == "silent" else 60.0)


def test_the_learners_cached_memory_goes_back_before_each_start(start, prompts, monkeypatch):
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    engine = start(["die 1", "ok"])
    assert len(emptied) == 1
    engine.generate(prompts, SAMPLING)
    assert len(emptied) == 2


def test_of_the_trainers_environment_a_worker_gets_no_rank_and_finds_its_own_programs(monkeypatch, tmp_path):
    """What torchrun sets; with TORCHELASTIC_USE_AGENT_STORE SGLang would wait for a store that nobody serves."""
    names = [f"{of}{name}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")]
    names += ["ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"]
    names += [f"TORCHELASTIC_{name}" for name in ("RESTART_COUNT", "MAX_RESTARTS", "RUN_ID", "USE_AGENT_STORE")]
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    environment = sglang_process.child_environment("bin/python")
    assert not set(names) & set(environment)
    assert environment["PATH"] == f"{tmp_path}/bin:/usr/bin"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_weights_that_did_not_arrive_stop_the_run(start):
    engine = start(["wrong"], has_weights=False)
    with pytest.raises(RuntimeError, match="does not hold the weights"):
        engine.load_weights(SCRIPTED_WEIGHTS, 5)
    assert engine.policy_version == 0


def test_a_worker_that_takes_no_weights_is_replaced(start, prompts):
    engine = start(["deaf", "ok"], timeout_s=0.5)
    assert engine.num_restarts == 1
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)


def test_close_leaves_no_process_and_no_file(start):
    engine = start(["ok"])
    pid, folder = engine._workers.seats[0].worker.child.pid, engine._folder
    engine.close()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_trainer_takes_its_worker_along(tmp_path):
    """Before it has connected: the worker watches its parent, so that it ends in the middle of SGLang's start, too."""
    code = (
        "import os, time\n"
        "from vcr1_fast.rollout.sgl.endpoint import Endpoint\n"
        "if os.fork() == 0:\n"
        f"    Endpoint('ipc://{tmp_path}/worker.sock', b'k' * 32, when_over=lambda: os._exit(1))\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)
