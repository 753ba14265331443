"""The short form of the fault program: some faults of most kinds lose nothing. At length: `python -m tests.faults`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_some_faults_of_most_kinds_lose_nothing():
    command = [sys.executable, "-m", "tests.faults", "--short", "--seed", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    all_kinds = next(line for line in done.stdout.splitlines() if line.startswith("| all "))
    num_tried, num_survived = (int(cell) for cell in all_kinds.split("|")[2:4])
    assert num_tried == num_survived >= 30
