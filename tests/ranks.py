"""Functions of tests on several ranks of this machine, forked from one process whose imports they share.

`python -m tests.ranks NUM_RANKS MODULE FUNCTION [ARGUMENT ...]` is what `on_ranks` starts.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.tiny_policy import REPOSITORY, fork_ranks


def on_ranks(function: Callable[..., None], *arguments: object, num_ranks: int = 2, timeout_s: float = 300.0) -> None:
    """`function(world, *arguments)`, the arguments as text, on CPU ranks; fails with what they printed."""
    module = Path(function.__code__.co_filename).relative_to(REPOSITORY).with_suffix("")
    command = [sys.executable, "-m", "tests.ranks", str(num_ranks), ".".join(module.parts), function.__name__]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout_s)[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]


def main() -> None:
    num_ranks, module, name, *arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown

    def on_rank(*_: str) -> None:
        world = init_distributed("cpu")
        function(world, *arguments)
        shutdown(world)
        exit_rank(0)

    fork_ranks(int(num_ranks), on_rank)


if __name__ == "__main__":
    main()
