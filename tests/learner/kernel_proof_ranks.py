"""Run by test_kernel_proof on each rank: patchify breaks on rank 1 alone, where log-probs are remembered.

Argument: output folder; each rank writes what it chose.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.learner.kernel_stand_ins import SUBJECT, patchify, put_stand_ins
from vcr1_fast.learner.kernel_proof import prove
from vcr1_fast.learner.sharding import exit_rank, init_distributed, shutdown

folder = Path(sys.argv[1])
torch.set_num_threads(1)
world = init_distributed("cpu")
os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{world.rank}")
monkeypatch = pytest.MonkeyPatch()
put_stand_ins(monkeypatch)
if world.rank == 1:
    prove(SUBJECT, kernels=("logprob",))

    def raises(*_arguments, **_options):
        raise RuntimeError("no space left")

    put_stand_ins(monkeypatch, patchify=raises)
else:
    put_stand_ins(monkeypatch, patchify=patchify)
proof = prove(SUBJECT, world, kernels=("logprob", "patchify"))
(folder / f"{world.rank}.json").write_text(json.dumps(asdict(proof.choice)))
shutdown(world)
exit_rank(0)
