"""The fused heads hold no more than `head_peak_bytes` says, at real sizes, counted on `meta` tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import PolicyLoss, TokenVectors, fused_linear_logprob, fused_linear_policy_loss
from vcr1_kernels.head_chunks import VECTORS_PER_ROW, auto_chunk_rows, head_peak_bytes, largest_chunk

from tests.kernels.device_traffic import DEVICE, LOOPS
from tests.kernels.test_device_traffic import LOSSES as ALL_LOSSES
from tests.live_bytes import LiveBytes

NUM_ROWS = 16_384
HEAD_3B, HEAD_7B = (2048, 151_936), (3584, 152_064)
LOSSES = {
    "token": PolicyLoss(beta=0.1),
    "entropy": PolicyLoss("dapo", beta=0.1, entropy_coef=0.01),  # the gradient of the logits in a second pass
    "sequence": PolicyLoss("gspo", beta=0.1, sampling_correction="sequence_mask", sampling_cap=2.0),
    "verl": PolicyLoss(dialect="verl", beta=0.1, sampling_correction="token_truncate", sampling_cap=2.0),
}


def make_head(num_rows: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden_size, vocab_size = size
    hidden_ND = torch.empty(num_rows, hidden_size, dtype=dtype, device=DEVICE, requires_grad=True)
    weight_VD = torch.empty(vocab_size, hidden_size, dtype=dtype, device=DEVICE, requires_grad=True)
    return hidden_ND, weight_VD, torch.empty(num_rows, dtype=torch.long, device=DEVICE)


def policy_loss_peak(
    num_rows: int, size: tuple[int, int], dtype: torch.dtype, loss: PolicyLoss, *, num_idle: int = 0, **options: Any
) -> int:
    """Of forward and backward; the last `num_idle` rows have no coefficient."""
    advantage_N, *others = torch.ones(6, num_rows)
    advantage_N[num_rows - num_idle :] = 0.0
    lens = (128,) * (num_rows // 128) + (num_rows % 128,)  # whole ones fill a chunk
    tokens = TokenVectors(advantage_N, *others[:4], sequence_lens=lens)
    trains_weight = options.pop("trains_weight", True)
    hidden, weight, target = make_head(num_rows, size, dtype)
    weight.requires_grad_(trains_weight)
    with LiveBytes(DEVICE, LOOPS) as live:
        fused_linear_policy_loss(hidden, weight, target, loss, tokens, 0.9, **options)[0].backward()
    assert (hidden.grad is not None, weight.grad is not None) == (True, trains_weight)
    return live.peak_bytes


@pytest.mark.parametrize("size", [HEAD_3B, HEAD_7B], ids=["3B", "7B"])
@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_holds_one_chunk_and_the_gradients(name: str, size: tuple[int, int]):
    peak = policy_loss_peak(NUM_ROWS, size, torch.bfloat16, LOSSES[name])
    is_whole = LOSSES[name].is_sequence_level
    chunk_rows = largest_chunk(size[1], 6) if is_whole else auto_chunk_rows(NUM_ROWS, *size, 6)
    bound = head_peak_bytes(NUM_ROWS, *size, torch.bfloat16, chunk_rows=chunk_rows)
    assert 0.99 * bound <= peak <= bound <= head_peak_bytes(NUM_ROWS, *size, torch.bfloat16)


@pytest.mark.parametrize("num_rows", [4096, 4097, 6000, 9000, 12_000])
def test_fewer_rows_never_need_more(num_rows: int):
    """Chunks of fewer rows may be larger: a plan for the most rows must cover them."""
    peak = policy_loss_peak(num_rows, HEAD_7B, torch.bfloat16, LOSSES["token"])
    bound, most = (head_peak_bytes(n, *HEAD_7B, torch.bfloat16) for n in (num_rows, NUM_ROWS))
    assert peak <= bound <= most


def test_the_bound_of_a_3b_head_by_hand():
    """4,096 rows at a time: 4,096 x 151,936 x 6 bytes of logits and E, 151,936 x 2,048 x 4 of dW, 64 MiB of dX."""
    assert auto_chunk_rows(NUM_ROWS, *HEAD_3B, 6) == 4096
    chunk, weight, hidden = 4096 * 151_936 * 6, 151_936 * 2048 * 4, NUM_ROWS * 2048 * 2
    vectors = NUM_ROWS * VECTORS_PER_ROW * 4
    assert head_peak_bytes(NUM_ROWS, *HEAD_3B, torch.bfloat16) == chunk + weight + hidden + vectors


@pytest.mark.parametrize(
    "options",
    [
        {"num_idle": 4096},  # rows are gathered, not sliced
        {"trains_weight": False},
        {"logits_dtype": torch.bfloat16, "chunk_rows": 4096},
        {"chunk_rows": 700},
        {"chunk_rows": NUM_ROWS},
    ],
    ids=str,
)
def test_policy_loss_with_options(options: dict[str, Any]):
    loss = PolicyLoss() if "num_idle" in options else LOSSES["token"]
    bound_options = {name: value for name, value in options.items() if name != "num_idle"}
    bound = head_peak_bytes(NUM_ROWS, *HEAD_3B, torch.bfloat16, **bound_options)
    peak = policy_loss_peak(NUM_ROWS, HEAD_3B, torch.bfloat16, loss, **options)
    assert 0.9 * bound <= peak <= bound  # frozen, dX is counted in float32: 64 MiB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_where_the_hidden_size_is_not_small_beside_the_vocabulary(name: str, dtype: torch.dtype):
    """The operands of the last products then weigh more than the logits."""
    for num_rows, chunk_rows in ((2048, 1024), (700, 1024), (5, 1024)):
        size = (1024, 512)
        peak = policy_loss_peak(num_rows, size, dtype, LOSSES[name], chunk_rows=chunk_rows)
        assert peak <= head_peak_bytes(num_rows, *size, dtype, chunk_rows=chunk_rows)


def test_vectors_of_every_loss():
    """A head of two by two: hardly any matrices."""
    for name, loss in ALL_LOSSES.items():
        assert policy_loss_peak(4096, (2, 2), torch.float32, loss) <= head_peak_bytes(4096, 2, 2, torch.float32), name


@pytest.mark.parametrize("trains_weight", [True, False])
@pytest.mark.parametrize("keep", ["auto", "none", "probs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logprob_head(dtype: torch.dtype, keep: str, trains_weight: bool):
    hidden, weight, target = make_head(NUM_ROWS, HEAD_3B, dtype)
    weight.requires_grad_(trains_weight)
    with LiveBytes(DEVICE, LOOPS) as live:
        logprob_N, entropy_N = fused_linear_logprob(
            hidden, weight, target, keep=keep, entropy_grad=keep == "none" and trains_weight
        )
        (logprob_N.sum() + entropy_N.sum()).backward()
    bound = head_peak_bytes(NUM_ROWS, *HEAD_3B, dtype, trains_weight=trains_weight)
    if keep == "probs" and trains_weight:
        bound += NUM_ROWS * HEAD_3B[1] * dtype.itemsize
    assert live.peak_bytes <= bound
    if keep == "none" and dtype == torch.bfloat16:
        assert live.peak_bytes >= 0.97 * bound


def test_scoring_holds_one_chunk_of_logits():
    hidden, weight, target = make_head(NUM_ROWS, HEAD_3B, torch.bfloat16)
    chunk = auto_chunk_rows(NUM_ROWS, *HEAD_3B, 6) * HEAD_3B[1] * 4
    tokens = TokenVectors(torch.ones(NUM_ROWS), torch.ones(NUM_ROWS))
    with torch.no_grad():
        for score in (
            lambda: fused_linear_logprob(hidden, weight, target),
            lambda: fused_linear_policy_loss(hidden, weight, target, PolicyLoss(), tokens),
        ):
            with LiveBytes(DEVICE, LOOPS) as live:
                score()
            assert chunk <= live.peak_bytes <= chunk + NUM_ROWS * VECTORS_PER_ROW * 4


def test_the_meter_counts_what_is_alive():
    with LiveBytes(DEVICE, LOOPS) as live:
        first = torch.empty(100, device=DEVICE)
        second = first + 1.0
        assert live.live_bytes() == 800
        view = second[:10]
        del second
        assert live.live_bytes() == 800  # the view holds all of it
        del view
        assert live.live_bytes() == 400
        first = first.add_(1.0) * 2.0
    assert live.peak_bytes == 800
