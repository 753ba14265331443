"""Groups of every kind that may change ranks, for test_exchange.py and its ranks."""

import dataclasses

import torch
from vcr1_kernels import patchify

from tests.learner.conftest import random_group
from vcr1_fast.types import Completion, RolloutGroup

SHARES = [[0, 1, 2, 3], [4, 5]]  # what each rank drew
HOMES = [0, 0, 0, 0, 1, 1]
RANK_OF = {0: 1, 1: 0, 2: 1, 3: 1, 4: 0}  # 5 is not run


def example_groups() -> list[RolloutGroup]:
    """Random pixels, pixels of frames in float32 and bfloat16, a frozen tower's embeddings, none at all, and NaN."""
    groups = [random_group(seed, (5, 0, 3 + seed)) for seed in range(6)]
    generator = torch.Generator().manual_seed(7)
    frames = torch.randint(0, 256, (6, 56, 112, 3), generator=generator, dtype=torch.uint8)
    no_values = torch.empty(0, 1176, dtype=torch.bfloat16)
    embeddings_MD = torch.randn(24, 32, generator=generator).to(torch.bfloat16)
    groups[1] = _with_patches(groups[1], values_PC=patchify(frames, torch.float32))
    groups[2] = _with_patches(groups[2], values_PC=patchify(frames, torch.bfloat16))
    groups[3] = _with_patches(groups[3], values_PC=no_values, embeddings_MD=embeddings_MD)
    truth = Completion(torch.tensor([3, 4, 1]), torch.full((3,), torch.nan), "stop", "an answer")
    groups[4] = dataclasses.replace(
        groups[4],
        completions=(*groups[4].completions, truth),
        reward_parts={"iou": (0.1, 0.2, 0.3, 1.0)},
        rewards=(0.1, 0.2, 0.3, 1.0),
        advantages=(-0.1, 1 / 3, 0.0, float("inf")),
    )
    return groups


def _with_patches(group: RolloutGroup, **changes: torch.Tensor) -> RolloutGroup:
    patches = dataclasses.replace(group.prompt.media[0], **changes)
    return dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, media=(patches,)))


def assert_same(got: object, want: object) -> None:
    """Every field, and every tensor bit for bit."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor) and got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.contiguous().reshape(-1).view(torch.uint8))
    elif dataclasses.is_dataclass(want):
        for field in dataclasses.fields(want):
            assert_same(getattr(got, field.name), getattr(want, field.name))
    elif isinstance(want, tuple) and isinstance(got, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want
