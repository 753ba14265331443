"""A small synthetic data set, written once for all end-to-end tests, and the command as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(
        SynthConfig(output_dir=str(folder), num_train=8, num_eval=2, kinds=("grounding", "tracking")),
        show_progress=False,
    )
    return folder


@pytest.fixture
def train_command(data_folder: Path) -> Callable[..., list[str]]:
    """train_command(run_folder, "--a.b=c", ...): `vcr1-fast train tiny` on the small data set."""

    def command(run: Path, *overrides: str, program: str = "train") -> list[str]:
        files = [f"{data_folder}/{{}}_{kind}.jsonl" for kind in ("grounding", "tracking")]
        return [
            *(sys.executable, "-m", "vcr1_fast", program, "tiny"),
            f"--data.train=[{','.join(f.format('train') for f in files)}]",
            f"--data.eval=[{','.join(f.format('eval') for f in files)}]",
            f"--train.output_dir={run}",
            "--train.prompts_per_step=4",
            "--rollout.group_size=4",
            *overrides,
        ]

    return command


@pytest.fixture
def run_command() -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """One thread, so that floating-point sums have one order."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    return run
