"""Moments of 8 bits: the updates of AdamW but for their rounding, and checkpoints that either optimizer takes.

torchao's step is run as it is written, but for the last test, which compiles it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.ranks import on_ranks
from vcr1_fast.learner.optimizer import build_optimizer, build_schedule
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, device_mesh
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.settings.config import OptimizerConfig

torchao = pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install 'vcr1-fast[torchao]'")

PLAIN = OptimizerConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, schedule="linear")
EIGHT = replace(PLAIN, name="adamw_8bit")
SHAPES_OF_RANKS = ((67, 256), (65, 128), (3,))


class Policy(nn.Module):
    """A matrix of 32 blocks, one of 4,100 numbers, which no block divides, and a bias; or of other shapes."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = ((64, 128), (41, 100), (64,))) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.coded, self.odd, self.bias = (nn.Parameter(torch.randn(*shape)) for shape in shapes)


def parts(config: OptimizerConfig):
    policy = Policy()
    optimizer = build_optimizer(policy, config)
    return policy, optimizer, build_schedule(optimizer, config, 10)


def update(parts, num_updates: int, first: int = 0) -> None:
    policy, optimizer, schedule = parts
    for index in range(first, first + num_updates):
        generator = torch.Generator().manual_seed(index)
        for weight in policy.parameters():
            grad = torch.randn(weight.shape, generator=generator)
            is_split = isinstance(weight, DTensor)
            weight.grad = distribute_tensor(grad, weight.device_mesh, weight.placements) if is_split else grad
        optimizer.step()
        schedule.step()


def update_on_two(world: World, run: str) -> None:
    """Rows of unequal number, some of them in blocks of 256."""

    def sharded():
        policy = Policy(SHAPES_OF_RANKS)
        fully_shard(policy, mesh=device_mesh(world))
        optimizer = build_optimizer(policy, EIGHT)
        return policy, optimizer, build_schedule(optimizer, EIGHT, 10)

    with torch.compiler.set_stance("force_eager"):
        saved = sharded()
        update(saved, 2)
        assert hasattr(saved[1].state[saved[0].coded]["exp_avg"], "codes")  # 34 or 33 rows of 256
        assert hasattr(saved[1].state[saved[0].odd]["exp_avg"], "codes") == (world.rank == 1)  # 33 or 32 rows of 128
        folder = save_checkpoint(run, *saved, RunState(2, 0, 0, 0, "", ""), world, keep=1)
        loaded = sharded()
        load_checkpoint(folder, *loaded, world)
        for weight, other in zip(saved[0].parameters(), loaded[0].parameters(), strict=True):
            was, now = (moments[w]["exp_avg"] for moments, w in ((saved[1].state, weight), (loaded[1].state, other)))
            assert torch.equal(getattr(was, "codes", was), getattr(now, "codes", now))
        update(saved, 1, first=2)
        whole = [weight.full_tensor() for weight in saved[0].parameters() if isinstance(weight, DTensor)]
    if world.is_main:
        torch.save(whole, Path(run) / "weights.pt")


def test_two_ranks_with_unequal_rows_are_one_process(tmp_path: Path):
    """Each rank rounds its own blocks, and the same checkpoint is gone on with by one process."""
    on_ranks(update_on_two, tmp_path)
    policy = Policy(SHAPES_OF_RANKS)
    optimizer = build_optimizer(policy, EIGHT)
    one = policy, optimizer, build_schedule(optimizer, EIGHT, 10)
    load_checkpoint(tmp_path / "checkpoints" / "step_000002", *one, SINGLE_PROCESS)
    before = [weight.detach().clone() for weight in policy.parameters()]
    update(one, 1, first=2)
    for was, mine, theirs in zip(before, policy.parameters(), torch.load(tmp_path / "weights.pt"), strict=True):
        assert (mine - theirs).abs().mean() < 0.05 * (mine - was).abs().mean()


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def test_updates_are_those_of_adamw_but_for_rounded_moments():
    start, plain, eight = Policy(), parts(PLAIN), parts(EIGHT)
    update(plain, 3)
    update(eight, 3)
    state = eight[1].state
    coded = state[eight[0].coded]["exp_avg"]
    assert coded.codes.dtype == torch.uint8 and coded.codes.numel() == 64 * 128 and coded.scale.shape == (32,)
    whole = state[eight[0].odd]["exp_avg"]
    assert whole.dtype == torch.float32 and not hasattr(whole, "codes")
    for name in ("odd", "bias"):  # moments in float32: nothing is rounded
        torch.testing.assert_close(getattr(eight[0], name), getattr(plain[0], name), rtol=1e-5, atol=1e-6)
    moved = (plain[0].coded - start.coded).abs().mean()
    gap = (plain[0].coded - eight[0].coded).abs().mean()
    assert 0 < gap < 0.05 * moved


@pytest.mark.parametrize(("before", "after"), [(EIGHT, EIGHT), (EIGHT, PLAIN), (PLAIN, EIGHT)])
def test_a_checkpoint_is_taken_by_either(tmp_path: Path, before: OptimizerConfig, after: OptimizerConfig):
    saved = parts(before)
    update(saved, 2)
    path = save_checkpoint(tmp_path, *saved, RunState(2, 0, 0, 0, "", ""), SINGLE_PROCESS, keep=1)
    loaded = parts(after)
    load_checkpoint(path, *loaded, SINGLE_PROCESS)
    for (_, weight), (_, other) in zip(saved[0].named_parameters(), loaded[0].named_parameters(), strict=True):
        was, now = saved[1].state[weight], loaded[1].state[other]
        assert now["step"] == 2
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = (x.dequantize() if hasattr(x, "codes") else x for x in (was[moment], now[moment]))
            exact = before == after or not hasattr(now[moment], "codes")
            # Rounding to codes: half the widest gap of the table, 0.0078, of a block's largest number
            bound = 1e-6 if exact else 0.008
            assert (a.flatten() - b.flatten()).abs().max() <= bound * a.abs().max()
            if before == after and hasattr(was[moment], "codes"):
                assert torch.equal(was[moment].codes, now[moment].codes)
    update(saved, 1, first=2)
    update(loaded, 1, first=2)
    torch.testing.assert_close(loaded[0].bias, saved[0].bias, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_step_is_the_same():
    eager, compiled = parts(EIGHT), parts(EIGHT)
    update(eager, 1)
    with torch.compiler.set_stance("default"):
        update(compiled, 1)
    for weight, other in zip(eager[0].parameters(), compiled[0].parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
