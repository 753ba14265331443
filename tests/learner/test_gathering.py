"""Weights gathered in buckets: what a bucket holds, how many there are, and that their values are the whole weights."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny_policy import TinyPolicy, run_ranks
from vcr1_fast.learner.gathering import BUCKET_BYTES, block_bytes, plan_buckets, whole_weights
from vcr1_fast.learner.lora import add_adapters, merged_parts, parts_of, split_weights
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES
from vcr1_fast.learner.sharding import named_weights
from vcr1_fast.settings.config import LoRAConfig

RANKS = Path(__file__).with_name("gathering_ranks.py")


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
def model_7b() -> Qwen2_5_VLForConditionalGeneration:
    """Names and shapes alone."""
    sizes = PUBLIC_SIZES["Qwen2.5-VL-7B"]
    text = {key: value for key, value in sizes.items() if key not in ("vision_config", "tie_word_embeddings")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sizes["vision_config"], tie_word_embeddings=False)
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


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


def test_two_ranks_get_what_gathering_one_by_one_gives():
    run_ranks(RANKS)
