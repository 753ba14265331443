"""Features that are pickled by reference. Needs no SGLang; that SGLang does so is in contract_checks.py."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from vcr1_fast.rollout.sgl.features import SharedFeatures

READER = """
import pickle, sys
got = pickle.load(sys.stdin.buffer)
got += 1
sys.stdout.write(f"{type(got).__name__} {got.dtype} {tuple(got.shape)} {float(got.double().sum())}")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_process_reads_what_was_shared_and_its_writing_stays_there(dtype):
    values = torch.arange(3 * 1176).remainder(7).view(3, 1176).to(dtype)
    shared = SharedFeatures.share(values)
    sent = pickle.dumps(shared)
    assert len(sent) < 300
    told = subprocess.run([sys.executable, "-c", READER], input=sent, capture_output=True, check=True, env=os.environ)
    assert told.stdout.decode() == f"Tensor {dtype} (3, 1176) {float(values.double().sum()) + values.numel()}"
    assert torch.equal(shared, values)
    assert type(shared[1:]) is type(shared.to(torch.float64)) is torch.Tensor  # a part is pickled whole
    assert torch.equal(pickle.loads(pickle.dumps(shared[1:])), values[1:])


def test_memory_is_given_back():
    shared = SharedFeatures.share(torch.ones(2, 1176))
    kept = pickle.loads(pickle.dumps(shared))
    sent = pickle.dumps(shared)
    shared.close()
    assert float(kept.sum()) == 2352
    with pytest.raises(OSError):
        pickle.loads(sent)
