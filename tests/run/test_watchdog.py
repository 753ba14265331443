"""A rank that hangs is seen: every rank prints its stacks, by itself, until the run is closed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_policy import free_port
from vcr1_fast.run.watchdog import Watchdog
from vcr1_fast.settings.config import ConfigError, TrainConfig

ROOT = Path(__file__).parents[2]
ALONE = """
import ctypes, sys, time
from vcr1_fast.run.watchdog import Watchdog
watchdog = Watchdog(0.6, rank=3)
for _ in range(5):
    time.sleep(0.3)
    watchdog.feed()
print("fed", file=sys.stderr, flush=True)
def holds_the_lock():
    ctypes.PyDLL(None).usleep(1_500_000)
holds_the_lock()
"""


def run_it(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env)


def test_every_rank_says_where_it_is(tmp_path: Path):
    port = str(free_port())
    ranks = [
        run_it(
            [str(Path(__file__).with_name("watchdog_ranks.py")), str(tmp_path)],
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    for rank, process in enumerate(ranks):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"rank {rank}: no step ended for 1 s (train.watchdog_s); its threads are at:" in err
        assert ("sleeps_in_its_step" if rank == 1 else "all_reduce") in err
        assert err.count("Timeout (0:00:01)!") == 2  # after one second and after two; none once the step had ended
        assert err.rstrip().endswith("done")


def test_a_hang_with_the_interpreter_lock_held_is_seen_and_a_run_that_goes_on_is_left_alone():
    process = run_it(["-c", ALONE])
    _, err = process.communicate(timeout=60)
    before, after = err.split("fed\n")
    assert before == "" and "Timeout (0:00:00" in after and "holds_the_lock" in after


def test_zero_is_never_and_less_is_refused(capfd: pytest.CaptureFixture[str]):
    watchdog = Watchdog(0.0, rank=0)
    watchdog.feed()
    watchdog.close()
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"train\.watchdog_s is -1"):
        TrainConfig(watchdog_s=-1)
