"""A small synthetic data set, written once for all end-to-end tests, and the command as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from vcr1_fast.cli import main
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset


class Ended(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(
        SynthConfig(output_dir=str(folder), num_train=8, num_eval=2, kinds=("grounding", "tracking")),
        show_progress=False,
    )
    return folder


@pytest.fixture
def train_arguments(data_folder: Path) -> Callable[..., list[str]]:
    """train_arguments(run_folder, "--a.b=c", ...): those of `vcr1-fast` to train `tiny` on the small data set."""

    def arguments(run: Path, *overrides: str, program: str = "train") -> list[str]:
        files = [f"{data_folder}/{{}}_{kind}.jsonl" for kind in ("grounding", "tracking")]
        return [
            *(program, "tiny"),
            f"--data.train=[{','.join(f.format('train') for f in files)}]",
            f"--data.eval=[{','.join(f.format('eval') for f in files)}]",
            f"--train.output_dir={run}",
            "--train.prompts_per_step=4",
            "--rollout.group_size=4",
            *overrides,
        ]

    return arguments


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Ended]:
    """run_here(arguments): `vcr1-fast` in this process, which saves the 4 s of CPU that importing torch takes.

    What is no clean end of the command is raised.
    """

    def run(arguments: list[str]) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def run_on_two_ranks(arguments: list[str]) -> Ended:
    """One thread each, so that floating-point sums have one order."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vcr1_fast"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    return Ended(done.returncode, done.stdout, done.stderr)
