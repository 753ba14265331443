"""Run by test_native_cuda on each of two ranks: all have a GPU, then rank 1 has one that there is no code for."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.native.cuda_stand_in import install
from vcr1_fast import native
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown
from vcr1_fast.tasks import native_cuda


def main() -> None:
    world = init_distributed("cpu")
    on_gpu = replace(world, device=torch.device("cuda", world.rank))
    said = []
    for failing_rank in (None, 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            install(monkeypatch, failure="no kernel image" if world.rank == failing_rank else "")
            native_cuda.choose_half(on_gpu)
            said.append((native.in_use(), native._half is native.on_cpu))
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(said))
    shutdown(world)
    exit_rank(0)


main()
