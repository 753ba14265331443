"""A row on its way to the device: one buffer, checked on the host."""

import dataclasses

import pytest
import torch

from vcr1_fast.learner.device_batch import DeviceBatch
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack, placeholder
from vcr1_fast.learner.transfer import send
from vcr1_fast.settings.config import ModelConfig
from vcr1_fast.types import PackedBatch

CPU = torch.device("cpu")


@pytest.fixture
def policy(make_model) -> PolicyModel:
    return PolicyModel(make_model(), ModelConfig(), torch.float32)


@pytest.fixture
def row(make_group) -> PackedBatch:
    groups = [make_group(seed=0, lengths=(4, 0, 3)), make_group(seed=1, lengths=(2,), grid=(1, 4, 4))]
    return pack(groups, [[0.1, 0.2, 0.3], [0.4]])


def embedded(row: PackedBatch, clips: range) -> PackedBatch:
    """The row with random features in the place of the pixels of these clips."""
    patches = [
        dataclasses.replace(p, values_PC=torch.zeros(0, 1176), embeddings_MD=torch.randn(p.num_tokens, 32))
        if index in clips
        else p
        for index, p in enumerate(row.patches)
    ]
    return dataclasses.replace(row, patches=tuple(patches))


def test_tensors_of_all_types_travel_in_one_buffer():
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "long": torch.arange(5).view(5, 1),
        "empty": torch.zeros(0, dtype=torch.float32),
        "float": torch.tensor([1.5, float("nan")]),
        "transposed": torch.arange(6, dtype=torch.int32).view(2, 3).T,
    }
    moved = send(tensors, CPU)
    assert list(moved) == list(tensors)
    for name, tensor in tensors.items():
        assert moved[name].dtype == tensor.dtype
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1
    assert all(tensor.data_ptr() % 16 == 0 for tensor in moved.values())


def test_a_device_batch_holds_what_the_row_says(policy: PolicyModel, row: PackedBatch):
    batch = policy.device_batch(row)
    for name in ("token_ids_T", "position_ids_3T", "scored_row_N", "target_N", "advantage_N", "weight_N"):
        assert torch.equal(getattr(batch, name), getattr(row, name))
    assert batch.sequence_lens == (4, 0, 3, 2) and batch.old_logprob_N is None
    assert batch.video_row_M.tolist() == [i for i, token in enumerate(row.token_ids_T.tolist()) if token == 60]
    assert batch.values_PC is not None and batch.values_PC.shape == (3 * 32 + 16, 1176)
    known = dataclasses.replace(row, old_logprob_N=torch.arange(9.0))
    assert torch.equal(policy.device_batch(known).old_logprob_N, torch.arange(9.0))


def test_a_row_that_does_not_fit_its_clips_is_refused(policy: PolicyModel, row: PackedBatch):
    short = dataclasses.replace(row, patches=row.patches[:1])
    with pytest.raises(ValueError, match="28 placeholders, but its videos and images stand for 24 tokens"):
        policy.device_batch(short)
    with pytest.raises(ValueError, match="1 of 2 clips come with embeddings, wanted all or none"):
        policy.device_batch(embedded(row, range(1)))


def test_with_a_frozen_tower_neither_a_row_nor_a_placeholder_runs_it(policy: PolicyModel, row: PackedBatch):
    """On two ranks with unequal rows one would wait for ever in a collective that the other never joins."""

    def runs_tower(batch: DeviceBatch) -> bool:
        seen: list[int] = []
        with policy.hf.model.visual.register_forward_hook(lambda *_: seen.append(1)):
            policy(batch, 1.0)
        return bool(seen)

    hf = policy.hf
    frozen = [embedded(row, range(2)), placeholder(policy.family, hf.config, True, CPU, torch.float32)]
    trained = [row, placeholder(policy.family, hf.config, False, CPU, torch.float32)]
    assert [runs_tower(policy.device_batch(batch)) for batch in frozen] == [False, False]
    assert [runs_tower(policy.device_batch(batch)) for batch in trained] == [True, True]
