import itertools
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import vcr1_fast.run.stopping as stopping_module
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.stop_signals import STOP_SIGNALS, StoppedBySignal, StopSignals, kept_from_children
from vcr1_fast.run.stopping import Stopping
from vcr1_fast.settings.config import CheckpointConfig


@pytest.fixture(autouse=True)
def _heard():
    """What a script starts with & has SIGINT ignored, and under nohup SIGHUP; processes pass that on to theirs."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(condition: Callable[[], object]) -> None:
    limit_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.005)


def start(code: str, **options: object) -> subprocess.Popen[str]:
    """A process that runs `code` and has printed "ready"."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", code], text=True, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_step_that_is_then_saved(number: signal.Signals, capfd):
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    saved = []
    is_ended = pytest.raises(StoppedBySignal, match=f"ended by {number.name} after step 2")
    with is_ended as ended, Stopping(CheckpointConfig(every=0), 9, SINGLE_PROCESS) as stopping:
        for step in range(1, 10):
            if step == 2:
                os.kill(os.getpid(), number)
                wait_for(lambda: stopping._signals.signum)
            if stopping.wants_checkpoint(step):
                saved.append(step)
            stopping.end_if_asked(step)
    assert (saved, ended.value.signum) == ([2], number)
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before
    assert f"{number.name}: the run ends after this step, with a checkpoint" in capfd.readouterr().err


def test_checkpoints_are_saved_by_steps_by_time_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    """The clock goes on by 25 s whenever it is read: at the beginning, once a step, and once a save."""
    clock = itertools.count(0, 25)
    monkeypatch.setattr(stopping_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    stopping = Stopping(CheckpointConfig(every=7, every_minutes=2.5), 9, SINGLE_PROCESS)
    assert [step for step in range(1, 10) if stopping.wants_checkpoint(step)] == [6, 7, 9]
    stopping = Stopping(CheckpointConfig(every=0, every_minutes=0.0), 9, SINGLE_PROCESS)
    assert [step for step in range(1, 10) if stopping.wants_checkpoint(step)] == [9]


def test_what_is_ignored_stays_so():
    """Under nohup, and for what a script starts with &."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: signals.signum)
            assert signals.signum == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_ends_at_once_though_the_main_thread_is_in_c():
    code = """
import ctypes
from vcr1_fast.run.stop_signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    ctypes.CDLL(None).poll(None, 0, 60_000)
    ctypes.CDLL(None).poll(None, 0, 60_000)
    ctypes.CDLL(None).poll(None, 0, 60_000)
"""
    process = start(code)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: the run ends after this step")
    process.send_signal(signal.SIGINT)  # torchrun's copy of the first one
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()


@pytest.mark.parametrize(("pause_s", "is_at_once"), [(0.1, False), (1.2, True)])
def test_a_second_ctrl_c_does_not_break_into_the_end_with_a_traceback(pause_s: float, is_at_once: bool):
    code = """
import sys, time
from vcr1_fast import cli
def work(tokens):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("taking down", flush=True)
        time.sleep(2)
        print("taken down", flush=True)
cli.PLAIN_COMMANDS["doctor"] = work
cli.main(["doctor"])
"""
    process = start(code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "taking down\n"
    time.sleep(pause_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == (("", "") if is_at_once else ("taken down\n", "vcr1-fast: error: interrupted\n"))


def test_a_ctrl_c_that_falls_into_a_callback_is_not_lost():
    """Python drops what is raised there, with a traceback."""
    code = """
import time
from vcr1_fast import cli
class Slow:
    def __del__(self):
        print("in a callback", flush=True)
        time.sleep(60)  # ended by the interrupt
def work(tokens):
    Slow()
    time.sleep(60)
cli.PLAIN_COMMANDS["doctor"] = work
cli.main(["doctor"])
"""
    process = start(code)
    assert process.stdout is not None and process.stdout.readline() == "in a callback\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "vcr1-fast: error: interrupted\n")


def test_a_terminal_that_closes_takes_no_run_with_it():
    """What is printed to it afterwards raises otherwise, before the checkpoint."""
    code = """
import sys, time
from vcr1_fast.run.stop_signals import StopSignals
from vcr1_fast.run.telemetry import say
with StopSignals() as signals:
    say("ready")
    while not signals.signum:
        time.sleep(0.01)
    say("step 1")
    print("checkpoint", file=sys.stderr, flush=True)
sys.exit(7)
"""
    ours, theirs = pty.openpty()
    process = start(code, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"ready")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 7


def test_children_do_not_see_the_signals_of_the_run():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with kept_from_children():
        child = subprocess.Popen(["sleep", "60"])
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        for number in STOP_SIGNALS:
            child.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.1)
    finally:
        child.kill()
    assert child.wait(30) == -signal.SIGKILL
