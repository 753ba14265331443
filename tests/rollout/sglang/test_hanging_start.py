"""The real worker process with an engine that never starts: it ends with the trainer that waits for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vcr1_fast.rollout.serve import Server
from vcr1_fast.rollout.sgl.link import WorkerGoneError, WorkerLink
from vcr1_fast.settings.learning import SGLangConfig

KEY = b"k" * 32
HANGING_ENGINE = """
import os, pathlib, time

__version__ = "0.0"

class Engine:
    def __init__(self, **_):
        pathlib.Path(os.environ["ENGINE_STARTS"]).touch()
        time.sleep(3600)
"""


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(HANGING_ENGINE)
    python = tmp_path / "python"  # what the trainer's PYTHONPATH names, a worker does not inherit
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{package.parent}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("ENGINE_STARTS", str(tmp_path / "starts"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    settings = SGLangConfig(python=str(python), start_timeout_s=60.0)
    server = Server(settings, checkpoint, bind=("127.0.0.1", 0), gpus=[None], key=KEY, logs=tmp_path / "logs")
    server.start(60)
    yield server
    server.close()


def wait_for(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"did not happen within {timeout_s:g} s"
        time.sleep(0.05)


def test_a_worker_that_hangs_in_its_start_is_not_left_behind_busy(serving, tmp_path):
    [station] = serving.stations
    trainer = WorkerLink("elsewhere", station.child.address, KEY, {})
    trainer.start()
    pid = station.child.pid
    with pytest.raises(WorkerGoneError):
        trainer.wait_ready(3)
    assert (tmp_path / "starts").exists() and Path(f"/proc/{pid}").exists()
    trainer.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10)
    wait_for(lambda: station.num_workers == 2, 60)  # for the next trainer
