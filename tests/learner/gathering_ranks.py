"""Run by test_gathering on each rank: weights gathered in buckets are those that are gathered one by one."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode

from tests.tiny_policy import TinyPolicy
from vcr1_fast.learner.gathering import BUCKET_BYTES, Part, _Gatherer, block_bytes, plan_buckets, whole_weights
from vcr1_fast.learner.lora import FACTORS, add_adapters, has_adapter, merged_parts, parts_of, scale_of, split_weights
from vcr1_fast.learner.sharding import World, exit_rank, init_distributed, named_weights, shard, shutdown, whole_tensor
from vcr1_fast.settings.config import LoRAConfig

SMALL_BYTES = 9_000  # the embedding, of 67 x 32 float32, is larger by half a row


def gathered(parts: list[Part], bucket_bytes: int) -> tuple[dict[str, Tensor], int]:
    """Copies, and how many collectives they took."""
    with CommDebugMode() as traffic:
        values = {name: value.clone() for name, value in whole_weights(parts, bucket_bytes)}
    return values, traffic.get_total_counts()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert torch.equal(got[name], value), name


def check_weights(world: World, tied: bool) -> None:
    policy = TinyPolicy(tied=tied)
    policy.register_buffer("counts", torch.arange(3))  # not divided, and not cast
    policy.register_buffer("mean", torch.tensor(0.1))  # without a dimension
    policy.pair = torch.nn.Parameter(torch.tensor([0.5, 0.25]))
    shard(policy, world, torch.bfloat16)
    weights = named_weights(policy)
    rows = {value.shape[0] for value in weights.values() if isinstance(value, DTensor)}
    assert {1, 2, 67} <= rows and ("hf.lm_head.weight" in weights) == (not tied)
    assert weights["one"].to_local().numel() == (world.rank == 0)
    for dtype in (None, torch.bfloat16):
        cast = {n: w.to(dtype) if dtype and w.is_floating_point() else w for n, w in weights.items()}
        want = {name: whole_tensor(weight) for name, weight in cast.items()}
        divided = [w for w in cast.values() if isinstance(w, DTensor)]
        sizes = [world.world_size * block_bytes(w.shape, w.dtype, world.world_size) for w in divided]
        for bucket_bytes in (1, SMALL_BYTES, BUCKET_BYTES):
            parts = parts_of(weights, dtype)
            got, num_collectives = gathered(parts, bucket_bytes)
            assert_same(got, want)
            assert num_collectives == len(plan_buckets(sizes, bucket_bytes))
            buffers = _Gatherer(parts, bucket_bytes)
            assert buffers._bucket_B.numel() + buffers._whole_B.numel() <= 2 * max(bucket_bytes, *sizes)
        assert num_collectives == 1


def check_adapters(world: World, base_dtype: torch.dtype) -> None:
    policy = TinyPolicy()
    add_adapters(policy.hf, LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj")), 0, base_dtype)
    policy.one.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, value in policy.named_parameters():
        if name.endswith("lora_B"):
            value.data.normal_(generator=generator)
    shard(policy, world, base_dtype)
    base, factors = split_weights(policy.hf)
    scale = scale_of(policy.hf)
    want = {}
    for name, weight in base.items():
        value = weight.detach()
        if has_adapter(name, factors):
            a_RK, b_NR = (factors[f"{name.removesuffix('.weight')}.{factor}"].detach() for factor in FACTORS)
            assert isinstance(a_RK, DTensor)
            value = value + scale * (b_NR @ a_RK.redistribute(placements=[Replicate()]))
        want[name] = whole_tensor(value)
    for dtype in (None, torch.bfloat16):
        cast = {name: value.to(dtype or value.dtype) for name, value in want.items()}
        for bucket_bytes in (SMALL_BYTES, BUCKET_BYTES):
            got, num_collectives = gathered(merged_parts(base, factors, scale, dtype), bucket_bytes)
            assert_same(got, cast)
        assert num_collectives == 2  # the A of all adapters, and everything else


def main() -> None:
    world = init_distributed("cpu")
    for tied in (False, True):
        check_weights(world, tied)
    for dtype in (torch.float32, torch.bfloat16):
        check_adapters(world, dtype)
    shutdown(world)
    exit_rank(0)


main()
