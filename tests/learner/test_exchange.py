"""Groups that change ranks are the same bit for bit, and training on them elsewhere gives the same updates."""

import dataclasses
from pathlib import Path

import pytest
import torch
from vcr1_kernels import patchify

from tests.learner.conftest import random_group
from tests.learner.test_step import make_config
from tests.ranks import on_ranks
from vcr1_fast.learner import step
from vcr1_fast.learner.exchange import exchange, from_bytes, to_bytes
from vcr1_fast.learner.sharding import World
from vcr1_fast.learner.step import Learner
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


@pytest.mark.parametrize("index", range(6))
def test_a_group_comes_back_from_bytes_bit_for_bit(index):
    group = example_groups()[index]
    assert_same(from_bytes(to_bytes(group)), group)


def test_pixels_of_frames_are_one_byte_each():
    num_values = 96 * 1176
    sizes = [to_bytes(group).numel() for group in example_groups()[:3]]
    assert sizes[0] > 4 * num_values  # random numbers are sent as float32
    rest = 3 * 256 * 4 + 3000  # the values of the bytes; ids, positions, log-probs and the pickle
    assert num_values < sizes[1] < num_values + rest and num_values < sizes[2] < num_values + rest


def test_views_of_larger_tensors_send_only_what_they_show():
    group = example_groups()[0]
    ids_R = torch.arange(1_000_000)[5:8]
    object.__setattr__(group.completions[0], "token_ids_R", ids_R)
    sent = to_bytes(group)
    assert sent.numel() < 500_000
    assert from_bytes(sent).completions[0].token_ids_R.tolist() == [5, 6, 7]


def test_one_process_keeps_its_groups():
    groups = dict(enumerate(example_groups()))
    assert exchange(groups, [0] * 6, {0: 0, 3: 0}, World()) == groups


def check_exchange(world: World) -> None:
    groups = example_groups()
    mine = {i: groups[i] for i, home in enumerate(HOMES) if home == world.rank}
    held = exchange(mine, HOMES, RANK_OF, world)
    for i, rank in RANK_OF.items():
        if rank == world.rank:
            assert_same(held[i], groups[i])
    kept = exchange(mine, HOMES, {i: HOMES[i] for i in RANK_OF}, world)
    assert kept == mine and all(kept[i] is mine[i] for i in mine)


def train(world: World, model: str) -> dict[str, object]:
    """Two updates of six groups, of which rank 0 has four, in rows of one group."""
    learner = Learner(make_config(Path(model), 1, minibatches_per_rollout=2), world, 10)
    plans = []
    plan_and_pack = step.plan_and_pack
    step.plan_and_pack = lambda *args: plans.extend(plan_and_pack(*args)) or plans
    reports = learner.update_grpo([random_group(seed, (5, 3, 8 + seed)) for seed in SHARES[world.rank]])
    return {
        "reports": [(report.sums, report.grad_norm) for report in reports],
        "rows": [update.plan.rows for update in plans],
        "num_rows": [len(update.rows) for update in plans],
    }


def exchange_and_train(world: World, model: str, out: str) -> None:
    check_exchange(world)
    torch.save(train(world, model), f"{out}.{world.rank}")


def test_two_ranks_exchange_and_train_as_one_process_does(make_model, make_group, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    on_ranks(exchange_and_train, tmp_path / "model", tmp_path / "out")
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in (0, 1)]

    assert ranks[0]["rows"] == ranks[1]["rows"] and ranks[0]["reports"] == ranks[1]["reports"]
    members = [[0, 1, 4], [2, 3, 5]]  # half of what each rank drew, and of each update rank 0 would have run 2 of 3
    for update, rows in zip(members, ranks[0]["rows"], strict=True):
        assert sorted(i for mine in rows for row in mine for i in row) == update
        assert sorted(len(mine) for mine in rows) == [1, 2]
    for rank, seen in enumerate(ranks):
        assert seen["num_rows"] == [len(rows[rank]) for rows in seen["rows"]]

    learner = Learner(make_config(tmp_path / "model", 1, minibatches_per_rollout=2), World(), 10)
    alone = learner.update_grpo([make_group(seed, (5, 3, 8 + seed)) for update in members for seed in update])
    for report, (sums, grad_norm) in zip(alone, ranks[0]["reports"], strict=True):
        assert grad_norm == pytest.approx(report.grad_norm, rel=1e-5)
        for name in ("loss", "tokens", "tokens_executed", "tokens_unshared", "entropy"):
            assert sums[name] == pytest.approx(report.sums[name], rel=1e-5, abs=1e-7), name
