"""Row functions of the head, Triton (interpreted without CUDA) and torch twin, against log_softmax in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vcr1_kernels.head_rows import exp_rows, gradient_rows
from vcr1_kernels.head_rows_launch import scale_unless_one_
from vcr1_kernels.row_stats import RowStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(params=[False, True], ids=["torch", "triton"])
def triton(request: pytest.FixtureRequest) -> bool:
    return request.param


def definition(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, d logprob / d logits) in float64."""
    z_CV = logits_CV.double() * scale_C.double()[:, None]
    all_logprobs_CV = torch.log_softmax(z_CV, 1)
    probs_CV = all_logprobs_CV.exp()
    entropy_C = -torch.where(probs_CV > 0, probs_CV * all_logprobs_CV, 0.0).sum(1)
    onehot_CV = torch.nn.functional.one_hot(target_C.long(), logits_CV.shape[1]).double()
    grad_CV = scale_C.double()[:, None] * (onehot_CV - probs_CV)
    return all_logprobs_CV.gather(1, target_C.long()[:, None])[:, 0], entropy_C, grad_CV


def make(num_rows: int, num_cols: int, spread: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits_CV = (spread * torch.randn(num_rows, num_cols, generator=generator)).to(dtype)
    target_C = torch.randint(0, num_cols, (num_rows,), generator=generator)
    scale_C = torch.rand(num_rows, generator=generator) + 0.5
    return logits_CV.to(DEVICE), target_C.to(DEVICE), scale_C.to(DEVICE)


def run_exp(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, triton: bool, dtype: torch.dtype | None = None):
    """Statistics and, poisoned beforehand, the matrix E."""
    exp_CV = torch.full(logits_CV.shape, NAN, dtype=dtype or torch.float32, device=logits_CV.device)
    return exp_rows(logits_CV, target_C, scale_C, exp_CV, triton), exp_CV


def logprob_gradient(stats: RowStats, exp_CV: Tensor, scale_C: Tensor) -> Tensor:
    return exp_CV * (-scale_C * stats.inv_total)[:, None]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


def assert_is_softmax(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    triton: bool,
    *,
    logprob: tuple[float, float] = (1e-6, 3e-6),
    entropy: tuple[float, float] = (1e-6, 3e-6),
    grad: float = 2e-6,
) -> tuple[RowStats, Tensor]:
    """Bounds: (relative, absolute) of both statistics, and relative of the gradient."""
    wanted = definition(logits_CV, target_C, scale_C)
    stats, exp_CV = run_exp(logits_CV, target_C, scale_C, triton)
    for got, exact, (rtol, atol) in zip((stats.logprob, stats.entropy), wanted[:2], (logprob, entropy), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=atol)
    assert relative_error(logprob_gradient(stats, exp_CV, scale_C), wanted[2]) < grad
    return stats, exp_CV


@pytest.mark.parametrize("num_cols", [2, 127, 1000, 4096, 4097, 9496, 151_936, 152_064])
def test_statistics_and_gradient_are_those_of_log_softmax(num_cols: int, triton: bool):
    assert_is_softmax(*make(5, num_cols), triton)


def test_one_column_has_probability_one(triton: bool):
    logits, target, scale = make(3, 1)
    stats, exp = run_exp(logits, target, scale, triton)
    assert stats.logprob.tolist() == [0.0] * 3
    assert stats.entropy.tolist() == [0.0] * 3
    assert exp.tolist() == [[0.0]] * 3


@pytest.mark.parametrize("position", ["first", "last", "first of the masked tail"])
def test_targets_at_the_edges(position: str, triton: bool):
    logits, _, scale = make(2, 4100)
    target = torch.full((2,), {"first": 0, "last": 4099}.get(position, 4096), device=DEVICE)
    assert_is_softmax(logits, target, scale, triton)


@pytest.mark.parametrize("offset", [-500.0, 500.0])
def test_a_common_offset_changes_nothing(offset: float, triton: bool):
    """Kernels that start a running maximum at 0, or count padding as exp(0), fail here at very negative logits."""
    logits, target, _ = make(4, 4100, spread=2.0)
    logits = logits + offset
    ones = torch.ones(4, device=DEVICE)
    assert_is_softmax(logits, target, ones, triton, logprob=(0, 1e-5), entropy=(0, 1e-5), grad=1e-5)


def test_unlikely_targets_take_the_second_offset(triton: bool):
    """z_max - z_y of 59, 61, 150 and 500: exp would overflow at 88 if the target stayed the offset."""
    logits, _, _ = make(4, 1000, spread=1.0)
    target = torch.full((4,), 7, device=DEVICE)
    scale = torch.ones(4, device=DEVICE)
    for row, margin in enumerate((59.0, 61.0, 150.0, 500.0)):
        logits[row, 7] = logits[row].amax() - margin
    bounds = {"logprob": (1e-6, 1e-5), "entropy": (1e-5, 2e-5), "grad": 1e-5}
    stats, exp = assert_is_softmax(logits, target, scale, triton, **bounds)
    assert bool(exp.isfinite().all())
    assert (stats.offset[2:] == logits[2:].amax(1)).all() and stats.offset[0] == logits[0, 7]


def test_sure_tokens_keep_their_small_log_prob_and_gradient(triton: bool):
    """p_y = 1 - 1e-13: z_y - logsumexp gives 0 in float32; summing without the target gives the right tail."""
    logits = torch.zeros(1, 100, device=DEVICE)
    logits[0, 3] = 34.5
    target, scale = torch.tensor([3], device=DEVICE), torch.ones(1, device=DEVICE)
    stats, exp = run_exp(logits, target, scale, triton)
    others = 99 * math.exp(-34.5)  # log_softmax and 1 - p_y cancel even in float64: worked out by hand
    assert math.isclose(float(stats.logprob), -others, rel_tol=1e-5)
    grad = logprob_gradient(stats, exp, scale)
    assert math.isclose(float(grad[0, 3]), others, rel_tol=1e-5)
    assert math.isclose(float(grad[0, 4]), -math.exp(-34.5), rel_tol=1e-5)


def test_masked_logits_count_nothing(triton: bool):
    """-inf is a probability of 0: entropy must not become 0 * -inf. A target of -inf has log-prob -inf."""
    logits, target, scale = make(3, 4100)
    logits[:, 100:] = -math.inf
    target = torch.tensor([5, 99, 200], device=DEVICE)
    stats, _ = assert_is_softmax(logits, target, scale, triton, entropy=(1e-5, 3e-6))
    assert stats.logprob[2] == -math.inf


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_bad_row_is_nan_and_alone(bad: float, triton: bool):
    logits, target, scale = make(3, 4100)
    clean, _ = run_exp(logits, target, scale, triton)
    logits[1, 17] = bad
    stats, exp = run_exp(logits, target, scale, triton)
    assert bool(stats.logprob[1].isnan()) and bool(stats.entropy[1].isnan())
    for row in (0, 2):
        assert stats.logprob[row] == clean.logprob[row] and bool(exp[row].isfinite().all())


def test_ignored_rows_give_zeros_whatever_they_hold(triton: bool):
    logits, target, scale = make(3, 4100)
    target[1] = -100
    logits[1] = NAN
    stats, exp = run_exp(logits, target, scale, triton)
    assert stats.logprob[1] == 0 and stats.entropy[1] == 0
    assert bool((exp[1] == 0).all())
    grad = torch.full_like(logits, NAN)
    gradient_rows(
        logits, target, scale, stats, torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE), grad, triton
    )
    assert bool((grad[1] == 0).all()) and bool(grad.isfinite().all())


def test_a_target_beyond_the_vocabulary_is_not_read():
    logits, target, scale = make(2, 1000)
    target[0] = 1000
    stats, _ = run_exp(logits, target, scale, True)
    assert bool(stats.logprob[0].isnan()) and bool(stats.logprob[1].isfinite())
    if DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError)):
            run_exp(logits, target, scale, False)


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64])
def test_strided_logits_and_unaligned_targets(target_dtype: torch.dtype, triton: bool):
    """Row stride above V, targets 8 bytes into their storage, rows of neighbours untouched."""
    wide, target, scale = make(4, 1100)
    logits = wide[:, 37:1037]
    shifted = torch.cat([target.new_zeros(1), target.clamp(max=999)]).to(target_dtype)[1:]
    logprob, _, grad = definition(logits.contiguous(), shifted, scale)
    store = torch.full((6, 1100), NAN, device=DEVICE)
    exp = store[1:5, 50:1050]
    stats = exp_rows(logits, shifted, scale, exp, triton)
    torch.testing.assert_close(stats.logprob.double(), logprob, rtol=1e-6, atol=3e-6)
    assert relative_error(logprob_gradient(stats, exp, scale), grad) < 2e-6
    canary = store.clone()
    canary[1:5, 50:1050] = NAN
    assert bool(canary.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [True, False])
def test_gradient_rows_of_log_prob_and_entropy(inplace: bool, dtype: torch.dtype, triton: bool):
    logits, target, scale = make(4, 4500, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    logprob_grad, entropy_grad = torch.randn(2, 4, generator=generator).to(DEVICE)
    leaf = logits.double().requires_grad_()
    z = leaf * scale.double()[:, None]
    all_logprobs = torch.log_softmax(z, 1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(1)
    value = (logprob_grad * all_logprobs.gather(1, target[:, None])[:, 0]).sum() + (entropy_grad * entropy).sum()
    value.backward()
    assert leaf.grad is not None

    stats = exp_rows(logits, target, scale, None, triton)
    grad = logits if inplace else torch.full_like(logits, NAN)
    gradient_rows(logits, target, scale, stats, logprob_grad, entropy_grad, grad, triton)
    # rounding to the result's dtype; Triton's interpreter truncates to bfloat16 where hardware rounds
    bound = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 2.0**-7}[dtype]
    assert relative_error(grad, leaf.grad) < bound


def test_expanded_gradients_are_read_right(triton: bool):
    logits, target, scale = make(3, 300)
    stats = exp_rows(logits, target, scale, None, triton)
    ones = torch.ones(1, device=DEVICE).expand(3)  # stride 0, what `.sum().backward()` sends
    grad, same = torch.empty_like(logits), torch.empty_like(logits)
    gradient_rows(logits, target, scale, stats, ones, None, grad, triton)
    gradient_rows(logits, target, scale, stats, ones.clone(), None, same, triton)
    assert torch.equal(grad, same)


def test_rows_do_not_depend_on_their_neighbours_or_the_run(triton: bool):
    logits, target, scale = make(5, 4500)
    stats, exp = run_exp(logits, target, scale, triton)
    again, exp_again = run_exp(logits, target, scale, triton)
    part, exp_part = run_exp(logits[2:4], target[2:4], scale[2:4], triton)
    assert torch.equal(exp, exp_again) and torch.equal(exp[2:4], exp_part)
    for whole, repeat, slice_ in zip(stats, again, part, strict=True):
        assert torch.equal(whole, repeat) and torch.equal(whole[2:4], slice_)


def test_statistics_do_not_depend_on_what_else_is_computed(triton: bool):
    """The scoring pass and the training pass must agree to the bit, so that the on-policy ratio is exactly 1."""
    logits, target, scale = make(4, 4500)
    with_exp, _ = run_exp(logits, target, scale, triton)
    without = exp_rows(logits, target, scale, None, triton)
    assert torch.equal(with_exp.logprob, without.logprob)


def test_gradient_rows_sum_to_zero_without_bias(triton: bool):
    """Over 64 seeds the mean signed sum of a row's gradient is within 4 standard errors of 0, in float16 storage."""
    sums = []
    for seed in range(64):
        logits, _, scale = make(2, 600, seed=seed)
        target = logits.argmax(1)  # E <= 1 fits float16, which the interpreter rounds as hardware does
        stats, exp = run_exp(logits, target, scale, triton, torch.float16)
        sums += logprob_gradient(stats, exp.double(), scale).sum(1).tolist()
    values = torch.tensor(sums)
    assert abs(float(values.mean())) < 4 * float(values.std()) / len(sums) ** 0.5
    assert float(values.abs().max()) < 2e-3


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA allocation is not sparse; the gpu test below fills a real one")
def test_row_offsets_are_64_bit(tmp_path: Path):
    """Rows 2^31 elements apart in a sparse file of which a few pages are touched; the interpreter wraps int32 too."""
    stride = 2**31 + 16
    flat = torch.from_numpy(np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(stride + 400,)))
    logits = flat.as_strided((2, 300), (stride, 1))
    values, target, scale = make(2, 300, dtype=torch.float16)
    logits.copy_(values)
    stats = exp_rows(logits, target, scale, None, True)
    assert torch.equal(stats.logprob, exp_rows(values, target, scale, None, True).logprob)
    ones = torch.ones(2)
    expected = torch.empty_like(values)
    gradient_rows(values, target, scale, stats, ones, None, expected, True)
    gradient_rows(logits, target, scale, stats, ones, None, logits, True)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_values", [0, 1, 4096, 10_000])
def test_scale_unless_one(num_values: int, dtype: torch.dtype):
    x = torch.randn(num_values).to(DEVICE, dtype)
    for factor in (1.0, 0.5):
        scaled = x.clone()
        scale_unless_one_(scaled, torch.tensor(factor, device=DEVICE))
        assert torch.equal(scaled, x * factor)


def test_row_functions_are_registered_right():
    logits, target, scale = make(3, 50)
    rows = torch.ops.vcr1_kernels
    for exp in (None, torch.empty_like(logits)):
        torch.library.opcheck(rows.exp_rows, (logits, target, scale, exp, False))
    stats = rows.exp_rows(logits, target, scale, None, False)
    for entropy_grad in (None, scale):
        arguments = (logits, target, scale, stats, scale, entropy_grad, torch.empty_like(logits), False)
        torch.library.opcheck(rows.gradient_rows, arguments)


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits():
    num_rows, num_cols = 14_200, 151_936
    logits = torch.empty(num_rows, num_cols, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.randint(0, num_cols, (num_rows,), device="cuda")
    scale = torch.ones(num_rows, device="cuda")
    stats = exp_rows(logits, target, scale, None, True)
    last = slice(num_rows - 8, num_rows)
    logprob, entropy, grad = definition(logits[last], target[last], scale[last])
    torch.testing.assert_close(stats.logprob[last].double(), logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy[last].double(), entropy, rtol=0, atol=1e-4)
    ones = torch.ones(num_rows, device="cuda")
    gradient_rows(logits, target, scale, stats, ones, None, logits, True)
    assert relative_error(logits[last], grad) < 2.0**-8
