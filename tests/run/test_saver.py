"""Checkpoints that are written beside the steps. The writer is stopped where a test needs a moment to last."""

import filecmp
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.run.test_checkpoint import make, state, train
from tests.run.test_stopping import wait_for
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import saver as saver_module
from vcr1_fast.run.checkpoint import load_checkpoint, save_checkpoint
from vcr1_fast.run.checkpoint_files import is_intact, latest_checkpoint, resolve_resume
from vcr1_fast.run.checkpoint_layout import tensor_file
from vcr1_fast.run.folder import prepare_output_dir
from vcr1_fast.run.named_model import checkpoint_of
from vcr1_fast.run.saver import CheckpointSaver
from vcr1_fast.run.stopping import Stopping
from vcr1_fast.settings.config import CheckpointConfig, ConfigError

DONE_S = 30.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return prepare_output_dir(tmp_path / "run")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(saver_module, "say", lines.append)
    return lines


def make_saver(run: Path, parts: Any, **settings: Any) -> CheckpointSaver:
    return CheckpointSaver(run, parts, CheckpointConfig(**settings), SINGLE_PROCESS)


def pid_of(saver: CheckpointSaver) -> int:
    assert saver._writer is not None
    return saver._writer.process.pid


@contextmanager
def stopped(saver: CheckpointSaver) -> Iterator[None]:
    os.kill(pid_of(saver), signal.SIGSTOP)
    yield
    os.kill(pid_of(saver), signal.SIGCONT)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_written_is_what_was_there_at_the_save(run: Path, said: list[str]):
    parts = make()
    train(parts, 1)
    with make_saver(run, parts) as saver:
        with stopped(saver):
            at_once = save_checkpoint(run.with_name("at_once"), *parts, state(1), SINGLE_PROCESS, 1)
            saver.save(state(1))
            train(parts, 1)
            saver.poll()
            assert names(run)[0].startswith("step_000001.tmp-") and len(names(run)) == 1
        saver.poll(wait=True)
        assert names(run) == ["step_000001"] and is_intact(run / "checkpoints" / "step_000001")
        assert 0 < saver.metrics()["checkpoint/write_s"] < DONE_S and saver.metrics() == {}
        files = [str(path.relative_to(at_once)) for path in at_once.rglob("*") if path.is_file()]
        _, other, missing = filecmp.cmpfiles(at_once, run / "checkpoints" / "step_000001", files, shallow=False)
        assert (other, missing) == ([], []) and len(files) == 3
        saver.save(state(2))  # by the same plan, into the same memory
    fresh = make(seed=9)
    assert load_checkpoint(run / "checkpoints" / "step_000002", *fresh, SINGLE_PROCESS) == state(2)
    for name, weight in parts[0].state_dict().items():
        assert torch.equal(fresh[0].state_dict()[name], weight), name
    assert said[1:] == [f"checkpoint: {run}/checkpoints/step_00000{step}" for step in (1, 2)]  # the end waits


def test_a_second_one_waits_for_the_first_and_says_so_once(run: Path, said: list[str]):
    with make_saver(run, make()) as saver:
        os.kill(pid_of(saver), signal.SIGSTOP)
        saver.save(state(1))
        threading.Timer(0.3, os.kill, (pid_of(saver), signal.SIGCONT)).start()
        for step in (2, 3):
            saver.save(state(step))
            assert f"step_{step - 1:06d}" in names(run)
    assert latest_checkpoint(run) == run / "checkpoints" / "step_000003"
    assert sum("the run waits for step_" in line for line in said) == 1


@pytest.mark.parametrize(
    ("fault", "reason"), [("kill", r"the process .*, \d+, ended with signal 9"), ("limit", "File too large")]
)
def test_a_writer_that_fails_ends_the_run_at_the_next_step(run: Path, fault: str, reason: str):
    parts = make()
    is_told = pytest.raises(OSError, match=rf"write checkpoint .*step_000002: .*{reason}.*; those before it stay")
    with is_told, make_saver(run, parts) as saver:
        saver.save(state(1))
        saver.poll(wait=True)
        if fault == "limit":
            resource.prlimit(pid_of(saver), resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        else:
            os.kill(pid_of(saver), signal.SIGSTOP)
        saver.save(state(2))
        if fault == "kill":
            os.kill(pid_of(saver), signal.SIGKILL)
        saver.poll(wait=True)
    assert names(run) == ["step_000001"]  # its space is given back
    assert latest_checkpoint(run) == run / "checkpoints" / "step_000001"


def test_after_an_error_of_the_run_its_last_checkpoint_is_completed(run: Path):
    with pytest.raises(ZeroDivisionError), make_saver(run, make()) as saver, stopped(saver):
        saver.save(state(1))
        threading.Timer(0.2, os.kill, (pid_of(saver), signal.SIGCONT)).start()
        raise ZeroDivisionError
    assert names(run) == ["step_000001"]


@pytest.mark.parametrize("moment", ["staging", "writing", "written"])
def test_kill_of_the_run_loses_no_checkpoint_and_leaves_no_writer(run: Path, moment: str):
    parts, told = make(), run.with_name("told")
    if not os.fork():
        saver = make_saver(run, parts).__enter__()
        saver.save(state(1))
        saver.poll(wait=True)
        if moment == "staging":
            saver._writer._staging._make_room = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        told.write_text(str(pid_of(saver)))
        if moment != "written":
            os.kill(pid_of(saver), signal.SIGSTOP)
        saver.save(state(2))
        wait_for(lambda: moment != "written" or list(run.glob("checkpoints/*.tmp-*/state.json")))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    wait_for(lambda: has_ended(int(told.read_text())))
    assert latest_checkpoint(run) == run / "checkpoints" / "step_000001"
    assert len(names(run)) == 2  # it named nothing
    prepare_output_dir(run)  # the next start
    assert names(run) == (["step_000001", "step_000002"] if moment == "written" else ["step_000001"])


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_without_the_memory_for_a_copy_it_is_written_between_steps(
    run: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    parts = make()
    needed = 12 * sum(weight.numel() for weight in parts[0].parameters())
    monkeypatch.setattr(saver_module, "free_host_bytes", lambda: int(needed / 0.8) - 10)
    with make_saver(run, parts) as saver:
        saver.save(state(1))
        assert names(run) == ["step_000001"] and saver._writer is None
    assert said[0].startswith("checkpoints: written between steps (written beside them they would take 0.0 GB")
    with pytest.raises(ConfigError, match=r"checkpoint.asynchronous is true, which takes 0.0 GB of host memory"):
        make_saver(run, parts, asynchronous=True).__enter__()
    monkeypatch.setattr(saver_module, "free_host_bytes", lambda: int(needed / 0.8) + 10)
    with make_saver(run, parts, asynchronous=True) as saver:
        assert saver._writer is not None


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_best_stays_and_is_known_after_a_resume(run: Path, mode: str, asynchronous: bool):
    sign = 1.0 if mode == "max" else -1.0
    settings = {"keep": 1, "keep_best": "eval/t/miou", "keep_best_mode": mode, "asynchronous": asynchronous}
    parts = make()

    def go_on(scores: dict[int, float]) -> None:
        with make_saver(run, parts, **settings) as saver:
            saver.noted(0, {"t/miou": sign * 9.0})  # before the first step: there is no checkpoint of it
            for step, score in scores.items():
                saver.save(state(step))
                scores_of_step = {"t/miou": sign * score}
                assert saver.noted(step, scores_of_step) is scores_of_step

    go_on({1: 0.2, 2: 0.5, 3: 0.4, 4: float("nan"), 5: 0.5})
    best = run / "checkpoints" / "best"
    assert names(run) == ["best", "best.json", "step_000002", "step_000005"]
    assert best.resolve().name == "step_000002" == Path(os.readlink(best)).name
    assert resolve_resume(str(best), run) == checkpoint_of(str(best)) == best
    go_on({6: 0.45})
    assert names(run) == ["best", "best.json", "step_000002", "step_000006"]
    go_on({7: 0.6, 8: 0.1})
    assert names(run) == ["best", "best.json", "step_000007", "step_000008"]
    assert load_checkpoint(best, *make(seed=9), SINGLE_PROCESS) == state(7)


def test_a_score_is_of_the_checkpoint_that_is_still_written_not_of_an_older_one_of_its_step(run: Path):
    """As after a resume from step 1: there is a folder of step 2 already."""
    settings = {"keep": 2, "keep_best": "eval/t/miou"}
    for scores in ((0.5, 0.2), (0.6,)):
        with make_saver(run, make(), **settings) as saver:
            for step, score in enumerate(scores, 3 - len(scores)):
                with stopped(saver):
                    saver.save(state(step))
                    saver.noted(step, {"t/miou": score})
                saver.poll(wait=True)
    record = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (record["checkpoint"], record["score"]) == ("step_000002", 0.6)


def test_keep_best_names_a_score_that_there_is(run: Path):
    saver = make_saver(run, make(), keep_best="eval/t/mIoU")
    with pytest.raises(ConfigError, match=r"keep_best is eval/t/mIoU, but the held-out scores are eval/t/miou: take"):
        saver.noted(0, {"t/miou": 0.1})


def test_each_score_has_a_checkpoint_with_keep_best():
    for keep_best, wanted in (("eval/t/miou", [3, 6, 7]), (None, [7])):
        with Stopping(CheckpointConfig(every=0, keep_best=keep_best), 7, SINGLE_PROCESS, eval_every=3) as stopping:
            assert [step for step in range(1, 8) if stopping.wants_checkpoint(step)] == wanted


def test_a_file_is_what_safetensors_reads():
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        "b": torch.tensor(2.5, dtype=torch.float64),
        "c": torch.empty(0, 4),
        "d": torch.tensor([True, False, True]),
    }
    file = tensor_file("x", tensors, {"format": "pt"})
    content = b"".join(file.parts())
    assert len(content) == file.num_bytes and len(file.head) % 8 == 0
    read = load(content)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_a_writer_whose_run_is_gone_before_its_answer_says_nothing(tmp_path: Path):
    ours, theirs = socket.socketpair()
    job = {"folder": str(tmp_path), "files": [], "rank": 0, "world_size": 1, "document": {"step": 1}}
    with tempfile.TemporaryFile() as memory:
        memory.write(b"\0")
        memory.flush()
        descriptors = (theirs.fileno(), memory.fileno())
        command = [sys.executable, "-m", "vcr1_fast.run.checkpoint_writer", *map(str, (*descriptors, os.getpid()))]
        ours.sendall(json.dumps(job).encode() + b"\n")
        ours.close()
        ended = subprocess.run(command, pass_fds=descriptors, capture_output=True, text=True, timeout=60, check=False)
    theirs.close()
    assert (ended.returncode, ended.stderr) == (0, "") and (tmp_path / "state.json").exists()
