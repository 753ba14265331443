"""Row functions of the language-model head over logits [C, V]: each has a Triton kernel and a plain torch twin.

    exp_rows       logits -> log-prob and entropy of every row, and optionally the unnormalised probabilities
    gradient_rows  logits and the gradients of log-prob and entropy -> gradient of the logits, in place if wanted

Both run one exp per element and nothing of size [C, V] beyond their result. The heavy work never sees a loss formula:
for every policy loss d(loss)/d(logits) = g (onehot - p) / temperature, with one number g per row.

Shape letters: C rows (tokens of one chunk), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .row_stats import RowStats, stats_dtype

IGNORED = -100  # a target that does not count: log-prob 0, entropy 0, no gradient
GUARD = 60.0  # largest scaled distance from the target's logit to the row's maximum that exp() takes as it is


def exp_rows(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, exp_CV: Tensor | None, triton: bool) -> RowStats:
    """Log-prob and entropy of each row in one pass.

    z = logits * scale;  logprob = z_y - logsumexp(z);  entropy = -sum_v p_v log p_v

    Args:
        logits_CV: [C, V] raw logits, last stride 1, any row stride. Entries of -inf are allowed (probability 0).
        target_C: [C] int; below 0 the row is ignored, from V on its results are NaN (on the CPU: IndexError).
        scale_C: [C] 1 / temperature, of the dtype of the statistics, > 0.
        exp_CV: filled with exp(scale (z_v - c)) and, at the target, with minus `others`; None leaves it out.
            exp_CV * (-scale * inv_total) is the gradient of logprob with respect to the logits. Not `logits_CV` itself.
        triton: run the kernel instead of the torch twin.

    A row with NaN, +inf or no finite logit has NaN results; other rows are not touched by it.
    Bytes: C V (size of a logit + size of exp_CV's element). One exp per element.
    """
    return RowStats(*_exp_rows_op(logits_CV, target_C, scale_C, exp_CV, triton).unbind())


def gradient_rows(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    stats: RowStats,
    logprob_grad_C: Tensor,
    entropy_grad_C: Tensor | None,
    grad_CV: Tensor,
    triton: bool,
) -> None:
    """Fills `grad_CV` with d(loss)/d(logits) given d(loss)/d(logprob) = g and d(loss)/d(entropy) = g_H of each row.

    dz_v = scale [ g (1[v = y] - p_v) - g_H p_v (log p_v + entropy) ];  rows with a target below 0 become 0.

    `grad_CV` may be `logits_CV` (in place) or a matrix of another dtype. `stats` are those of `exp_rows` on the same
    logits. Bytes: C V (size of a logit + size of a gradient). One exp per element.
    """
    _gradient_rows_op(
        logits_CV, target_C, scale_C, torch.stack(tuple(stats)), logprob_grad_C, entropy_grad_C, grad_CV, triton
    )


@torch.library.custom_op(add_op_namespace_prefix("exp_rows"), mutates_args=("exp_CV",))
def _exp_rows_op(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, exp_CV: Tensor | None, triton: bool) -> Tensor:
    """The rows of RowStats as [5, C]."""
    if triton:
        from . import head_rows_launch

        return torch.stack(head_rows_launch.exp_rows(logits_CV, target_C, scale_C, exp_CV))
    return torch.stack(_exp_rows_torch(logits_CV, target_C, scale_C, exp_CV))


@_exp_rows_op.register_fake
def _(logits_CV, target_C, scale_C, exp_CV, triton):
    return scale_C.new_empty(5, logits_CV.shape[0])


@torch.library.custom_op(add_op_namespace_prefix("gradient_rows"), mutates_args=("grad_CV",))
def _gradient_rows_op(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    stats_5C: Tensor,
    logprob_grad_C: Tensor,
    entropy_grad_C: Tensor | None,
    grad_CV: Tensor,
    triton: bool,
) -> None:
    stats = RowStats(*stats_5C.unbind())
    if triton:
        from . import head_rows_launch

        head_rows_launch.gradient_rows(logits_CV, target_C, scale_C, stats, logprob_grad_C, entropy_grad_C, grad_CV)
    else:
        _gradient_rows_torch(logits_CV, target_C, scale_C, stats, logprob_grad_C, entropy_grad_C, grad_CV)


@_gradient_rows_op.register_fake
def _(logits_CV, target_C, scale_C, stats_5C, logprob_grad_C, entropy_grad_C, grad_CV, triton):
    return None


def _distances(logits_CV: Tensor, offset_C: Tensor, scale_C: Tensor) -> Tensor:
    return (logits_CV.to(offset_C.dtype) - offset_C[:, None]) * scale_C[:, None]


def _check_values(target_C: Tensor, scale_C: Tensor, vocab_size: int) -> None:
    """On the CPU, where reading them waits for nothing. IndexError or ValueError for the first that cannot be right."""
    if target_C.device.type != "cpu" or not target_C.numel():
        return
    if (largest := int(target_C.max())) >= vocab_size:
        raise IndexError(f"target {largest} is not in a vocabulary of {vocab_size}: wanted 0 to {vocab_size - 1}, "
                         "or -100 to leave a row out")  # fmt: skip
    if not bool(((scale_C > 0) & scale_C.isfinite()).all()):
        raise ValueError("a temperature of the rows is not a finite number > 0")


def _exp_rows_torch(logits_CV: Tensor, target_C: Tensor, scale_C: Tensor, exp_CV: Tensor | None) -> RowStats:
    """The kernel's algorithm, step by step, on whole matrices."""
    _check_values(target_C, scale_C, logits_CV.shape[1])
    counted_C = target_C >= 0
    target_C1 = target_C.clamp(min=0).long().unsqueeze(1)
    dtype = stats_dtype(logits_CV.dtype)
    target_logit_C = logits_CV.gather(1, target_C1).squeeze(1).to(dtype)
    largest_C = logits_CV.amax(1).to(dtype)
    excess_C = (largest_C - target_logit_C) * scale_C
    offset_C = torch.where((excess_C > GUARD) | excess_C.isnan(), largest_C, target_logit_C)

    distance_CV = _distances(logits_CV, offset_C, scale_C)
    e_CV = distance_CV.exp()
    others_C = e_CV.scatter(1, target_C1, 0.0).sum(1)
    target_distance_C = (target_logit_C - offset_C) * scale_C
    others_and_rest_C = others_C + torch.expm1(target_distance_C)
    log_total_C = torch.log1p(others_and_rest_C)
    inv_total_C = 1.0 / (1.0 + others_and_rest_C)
    weighted_C = torch.where(e_CV == 0.0, 0.0, e_CV * distance_CV).sum(1)
    entropy_C = log_total_C - weighted_C * inv_total_C
    if exp_CV is not None:
        exp_CV.copy_(e_CV.scatter(1, target_C1, -others_C.unsqueeze(1)).masked_fill(~counted_C[:, None], 0.0))
    values = (target_distance_C - log_total_C, entropy_C, offset_C, inv_total_C, others_C)
    return RowStats(*(torch.where(counted_C, x, 0.0) for x in values))


def _gradient_rows_torch(
    logits_CV: Tensor,
    target_C: Tensor,
    scale_C: Tensor,
    stats: RowStats,
    logprob_grad_C: Tensor,
    entropy_grad_C: Tensor | None,
    grad_CV: Tensor,
) -> None:
    counted_C = target_C >= 0
    target_C1 = target_C.clamp(min=0).long().unsqueeze(1)
    distance_CV = _distances(logits_CV, stats.offset, scale_C)
    prob_CV = distance_CV.exp() * stats.inv_total[:, None]
    per_prob_C = -logprob_grad_C * scale_C
    at_target_C = logprob_grad_C * scale_C * stats.others * stats.inv_total
    result_CV = (per_prob_C[:, None] * prob_CV).scatter(1, target_C1, at_target_C.unsqueeze(1))
    if entropy_grad_C is not None:
        # log p_v + H
        surprise_CV = distance_CV + (stats.inv_total.log() + stats.entropy)[:, None]
        entropy_part_CV = -(entropy_grad_C * scale_C)[:, None] * prob_CV * surprise_CV
        result_CV = result_CV + torch.where(prob_CV == 0.0, 0.0, entropy_part_CV)
    grad_CV.copy_(result_CV.masked_fill(~counted_C[:, None], 0.0))
