"""Other projects' code is entered below its top, and what cannot be loaded has a reason."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.head_problem import HEADS, TRAINED, head_reference, make_head_problem


def write_package(folder: Path) -> None:
    """`heavy` cannot be imported; `heavy.inner.kernel` needs a sibling of its own package."""
    (folder / "heavy" / "inner").mkdir(parents=True)
    (folder / "heavy" / "__init__.py").write_text("import a_package_that_does_not_exist\n")
    (folder / "heavy" / "inner" / "__init__.py").write_text("raise RuntimeError('not this one either')\n")
    (folder / "heavy" / "numbers.py").write_text("ANSWER = 42\n")
    (folder / "heavy" / "inner" / "kernel.py").write_text("from ..numbers import ANSWER\n")


def test_a_module_is_imported_without_its_parents(tmp_path):
    write_package(tmp_path)
    code = (
        "from bench.peers import import_below, load_all\n"
        "assert import_below('heavy.inner.kernel').ANSWER == 42\n"
        "import importlib.util; assert importlib.util.find_spec('heavy') is not None\n"
        "_, [absent] = load_all({'away': lambda: import_below('absent_package.kernel')})\n"
        "assert absent.reason == 'ModuleNotFoundError: absent_package is not installed', absent\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["XTuner's way, 1024 rows", "torchtitan's way, 8 chunks"])
def test_heads_that_finish_a_chunk_at_a_time_take_three_products(name: str):
    """1,032 rows: 1,024 and 8, or eight times 129."""
    problem = make_head_problem(HEADS["small"], 1032, torch.float64, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        got = TRAINED[name]()(problem)
    assert counter.get_total_flops() == 3 * 2 * 1032 * 64 * 1187
    expected = head_reference(problem)
    for key in ("loss", "grad_hidden", "grad_weight"):  # log-probs are float32
        torch.testing.assert_close(got[key].double(), expected[key].double(), rtol=1e-4, atol=1e-8)
