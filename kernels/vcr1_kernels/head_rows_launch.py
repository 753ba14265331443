"""Launches the Triton kernels of head_rows.py. Imported only when they run, so that torch alone is enough otherwise."""

# pyright: reportArgumentType=false
# Triton's constants are plain Python values at the launch and `constexpr` inside the kernel.
from __future__ import annotations

import torch
from torch import Tensor

from .device.head_rows import LAUNCH, exp_rows_kernel, gradient_rows_kernel, scale_unless_one_kernel
from .row_stats import RowStats

SCALE_PROGRAMS = 132 * 8  # enough to fill an H200 when the factor is not 1, few enough to end at once when it is


def _check_rows(name: str, rows_CV: Tensor) -> None:
    if rows_CV.stride(1) != 1 and rows_CV.shape[1] > 1:
        raise ValueError(f"{name} has strides {rows_CV.stride()}, wanted a last stride of 1: call .contiguous() first")


def exp_rows(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, exp_CV: Tensor | None) -> RowStats:
    _check_rows("logits", logits_CV)
    num_rows, num_cols = logits_CV.shape
    out_CV = logits_CV if exp_CV is None else exp_CV
    stats = RowStats(*torch.empty(5, num_rows, dtype=torch.float32, device=logits_CV.device).unbind())
    if num_rows == 0:
        return stats
    with torch.cuda.device_of(logits_CV):  # Triton launches on the current device, wherever the tensors are
        exp_rows_kernel[(num_rows,)](
            logits_CV, out_CV, target_C.contiguous(), scale_C.contiguous(), *stats,
            logits_CV.stride(0), out_CV.stride(0), num_cols,
            WITH_EXP=exp_CV is not None, **LAUNCH,
        )  # fmt: skip
    return stats


def gradient_rows(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    stats: RowStats,
    logprob_grad_C: Tensor,
    entropy_grad_C: Tensor | None,
    grad_CV: Tensor,
) -> None:
    _check_rows("logits", logits_CV)
    _check_rows("the gradient", grad_CV)
    num_rows, num_cols = logits_CV.shape
    if num_rows == 0:
        return
    # An expanded gradient (stride 0, from `.sum()`) would be read out of bounds: the kernel takes it as contiguous.
    logprob_grad_C = logprob_grad_C.float().contiguous()
    entropy_or_any_C = logprob_grad_C if entropy_grad_C is None else entropy_grad_C.float().contiguous()
    with torch.cuda.device_of(logits_CV):
        gradient_rows_kernel[(num_rows,)](
            logits_CV, grad_CV, target_C.contiguous(), scale_C.contiguous(), logprob_grad_C, entropy_or_any_C,
            stats.entropy, stats.offset, stats.inv_total, stats.others,
            logits_CV.stride(0), grad_CV.stride(0), num_cols,
            WITH_ENTROPY=entropy_grad_C is not None, **LAUNCH,
        )  # fmt: skip


def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    num_values = x.numel()
    if num_values:
        grid = (min((num_values + LAUNCH["BLOCK"] - 1) // LAUNCH["BLOCK"], SCALE_PROGRAMS),)
        with torch.cuda.device_of(x):
            scale_unless_one_kernel[grid](x, factor.detach().float(), num_values, **LAUNCH)
