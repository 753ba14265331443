"""One run per folder: refused at once on this machine, after a look at the heartbeat where flock cannot tell."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run import folder_lock
from vcr1_fast.run.folder_lock import locked_folder
from vcr1_fast.settings.config import ConfigError

HOLDER = """
import sys, time
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.folder_lock import locked_folder
with locked_folder(sys.argv[1], SINGLE_PROCESS):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_blocks_nobody(tmp_path: Path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another run is at work \(process {holder.pid} on .*choose another"):
            locked_folder(tmp_path / "run", SINGLE_PROCESS).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked_folder(tmp_path / "run", SINGLE_PROCESS):
            assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / "lock").read_bytes() == b""


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("has_flock", [True, False])
@pytest.mark.parametrize("is_alive", [True, False])
def test_a_record_of_another_machine_counts_while_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flock: bool, is_alive: bool
):
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.1)
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    record = tmp_path / "lock"
    record.write_text(json.dumps({"host": "elsewhere", "pid": 7, "began": "at noon"}))
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.1):
            record.touch()

    toucher = threading.Thread(target=touch)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: (done.set(), toucher.is_alive() and toucher.join()))
        if is_alive:
            toucher.start()
            with pytest.raises(ConfigError, match="process 7 on elsewhere, since at noon"):
                stack.enter_context(locked_folder(tmp_path, SINGLE_PROCESS))
        else:
            stack.enter_context(locked_folder(tmp_path, SINGLE_PROCESS))
            before_ns = record.stat().st_mtime_ns
            time.sleep(0.3)
            assert record.stat().st_mtime_ns > before_ns  # this run touches it now


def test_without_flock_the_process_and_the_last_record_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.1)
    with locked_folder(tmp_path, SINGLE_PROCESS), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        locked_folder(tmp_path, SINGLE_PROCESS).__enter__()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    own = json.loads(gone.stdout)
    with locked_folder(tmp_path, SINGLE_PROCESS):
        record = (tmp_path / "lock").read_text()
    (tmp_path / "lock").write_text(json.dumps(json.loads(record) | {"pid": own}))
    monkeypatch.setattr(folder_lock, "BEAT_S", 60.0)  # its process is gone: nothing is waited for
    with locked_folder(tmp_path, SINGLE_PROCESS):
        pass
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "lock").write_text('{"host": "faster", "pid": 1}'))
    with pytest.raises(ConfigError, match="process 1 on faster"):
        locked_folder(tmp_path, SINGLE_PROCESS).__enter__()


def test_a_torn_record_is_no_record(tmp_path: Path):
    (tmp_path / "lock").write_text('{"host": "else')
    with locked_folder(tmp_path, SINGLE_PROCESS):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
