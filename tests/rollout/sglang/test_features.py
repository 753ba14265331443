"""Features that are pickled by reference. Needs no SGLang; that SGLang does so is in contract_checks.py."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from vcr1_fast.rollout.sgl import features
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
    assert len(sent) < 400
    told = subprocess.run([sys.executable, "-c", READER], input=sent, capture_output=True, check=True, env=os.environ)
    assert told.stdout.decode() == f"Tensor {dtype} (3, 1176) {float(values.double().sum()) + values.numel()}"
    assert torch.equal(shared, values)
    assert type(shared[0]) is type(shared[::2]) is type(shared.to(torch.float64)) is torch.Tensor
    assert len(pickle.dumps(shared[1:])) < 400 and torch.equal(pickle.loads(pickle.dumps(shared[1:])), values[1:])


def test_parts_share_one_mapping():
    shared = SharedFeatures.share(torch.arange(6.0).view(6, 1))
    first, _, third = (pickle.loads(pickle.dumps(shared[i : i + 2])) for i in (0, 2, 4))
    assert (first.flatten().tolist(), third.flatten().tolist()) == ([0.0, 1.0], [4.0, 5.0])
    assert third.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_memory_is_given_back():
    shared = SharedFeatures.share(torch.ones(2, 1176))
    sent, other = pickle.dumps(shared), pickle.dumps(SharedFeatures.share(torch.ones(2)))
    kept = pickle.loads(sent)
    shared.close()
    assert float(kept.sum()) == 2352
    opened_again = SharedFeatures.share(torch.zeros(2, 1176))  # most likely with the same descriptor
    for gone in (sent, other):
        features.kept_mapped.cache_clear()
        with pytest.raises(OSError):
            pickle.loads(gone)
    assert float(pickle.loads(pickle.dumps(opened_again)).sum()) == 0
