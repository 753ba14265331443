"""Weights gathered in buckets: what a bucket holds, how many there are, and that their values are the whole weights."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.ranks import on_ranks
from tests.tiny_policy import TinyPolicy
from vcr1_fast.learner.gathering import BUCKET_BYTES, Part, _Gatherer, block_bytes, plan_buckets, whole_weights
from vcr1_fast.learner.lora import FACTORS, add_adapters, has_adapter, merged_parts, parts_of, scale_of, split_weights
from vcr1_fast.learner.sharding import World, named_weights, shard, whole_tensor
from vcr1_fast.settings.config import LoRAConfig

SMALL_BYTES = 9_000  # the embedding, of 67 x 32 float32, is larger by half a row


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([7], [range(1)]),  # larger than a bucket
        ([3, 3, 3], [range(2), range(2, 3)]),
        ([1, 9, 1, 5, 1], [range(1), range(1, 2), range(2, 4), range(4, 5)]),
        ([0, 6, 0, 0, 1, 0], [range(4), range(4, 6)]),  # 0: not divided, travels with its neighbours
        ([0, 0], [range(2)]),
    ],
)
def test_a_bucket_takes_what_fits_in_order(sizes, buckets):
    assert plan_buckets(sizes, 6) == buckets


@pytest.mark.parametrize(
    ("shape", "dtype", "num_ranks", "num_bytes"),
    [
        ((67, 32), torch.bfloat16, 2, 34 * 32 * 2),
        ((67, 32), torch.float32, 3, 23 * 32 * 4),
        ((1,), torch.float32, 2, 16),  # 4, up to the next multiple of 16
        ((5, 3, 2), torch.bfloat16, 4, 32),  # 2 rows of 12 bytes
    ],
)
def test_every_rank_has_room_for_the_rows_of_the_first(shape, dtype, num_ranks, num_bytes):
    assert block_bytes(shape, dtype, num_ranks) == num_bytes


@pytest.fixture(scope="module")
def model_7b(config_7b) -> Qwen2_5_VLForConditionalGeneration:
    """Names and shapes alone."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config_7b)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 64])
def test_a_7b_model_travels_in_14_collectives_within_the_memory_stated(model_7b, num_ranks):
    weights = named_weights(model_7b)
    assert sum(weight.numel() for weight in weights.values()) == 8_292_166_656
    sizes = [num_ranks * block_bytes(weight.shape, torch.bfloat16, num_ranks) for weight in weights.values()]
    buckets = plan_buckets(sizes, BUCKET_BYTES)
    assert len(buckets) == 14
    largest_bucket = max(sum(sizes[index] for index in bucket) for bucket in buckets)
    assert largest_bucket + max(sizes) < 2.35e9 < 2 * BUCKET_BYTES


def test_a_push_of_a_7b_models_adapters_takes_28_collectives_at_most(model_7b):
    """Two for each bucket, where the A of all matrices of the decoder are gathered first."""
    sizes = []
    for name, weight in named_weights(model_7b).items():
        has_adapter = ".layers." in name and weight.ndim == 2
        factor_bytes = block_bytes((32, weight.shape[-1]), torch.float32, 8) if has_adapter else 0
        sizes.append(8 * (block_bytes(weight.shape, torch.bfloat16, 8) + factor_bytes))
    assert 2 * len(plan_buckets(sizes, BUCKET_BYTES)) == 28


def test_one_process_gets_its_own_weights_uncopied_unless_they_are_cast():
    weights = named_weights(TinyPolicy(tied=True))
    same = dict(whole_weights(parts_of(weights)))
    assert list(same) == list(weights)
    assert all(same[name].data_ptr() == weight.data_ptr() for name, weight in weights.items())
    assert not any(value.requires_grad for value in same.values())
    half = dict(whole_weights(parts_of(weights, torch.bfloat16)))
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in weights.items())


def test_sums_of_adapters_are_added_up_in_float32_whatever_the_matrices_are():
    hf = TinyPolicy().hf
    add_adapters(hf, LoRAConfig(rank=2, alpha=4.0, targets=("q_proj",)), 0, torch.bfloat16)
    base, factors = split_weights(hf)
    name = "model.language_model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        factors[f"{name}.lora_B"].fill_(1e-3)
    sums = dict(whole_weights(merged_parts(base, factors, 2.0)))
    want = base[f"{name}.weight"].float() + 2.0 * (factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"])
    assert torch.equal(sums[f"{name}.weight"], want) and not torch.equal(want, want.bfloat16().float())
    assert {value.dtype for other, value in sums.items() if "q_proj.weight" not in other} == {torch.bfloat16}


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


def check_two_ranks(world: World) -> None:
    for tied in (False, True):
        check_weights(world, tied)
    for dtype in (torch.float32, torch.bfloat16):
        check_adapters(world, dtype)


def test_two_ranks_get_what_gathering_one_by_one_gives():
    on_ranks(check_two_ranks)
