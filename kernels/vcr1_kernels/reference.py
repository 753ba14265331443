"""Every op of this package in plain torch: what "correct" means. Differentiable by autograd, any dtype up to float64.

Shape letters: F frames, H W pixels (patchify) or H K query and key heads (attention), P patches, T packed tokens,
N scored tokens, D hidden size, V vocabulary, C head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .input_checks import check_frames
from .losses import LossFunction, TokenVectors
from .prefix_attention import PrefixLayout
from .row_stats import SUPPRESSED_LOGIT


def logprob_of_logits(logits_NV: Tensor, target_N: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and the entropy of that softmax.

    z = logits / temperature,  logprob_i = z_iy - logsumexp_v z_iv,  entropy_i = logsumexp_v z_iv - sum_v p_iv z_iv

    Args:
        logits_NV: [N, V]; -inf is a probability of 0.
        target_N: [N] int in 0..V-1; -100 gives log-prob 0, entropy 0 and no gradient.
        temperature: > 0, or [N].

    Returns: two tensors [N], float32 for half-precision inputs, else of the dtype of the inputs. Both carry gradients.
    """
    if logits_NV.dtype in (torch.bfloat16, torch.float16):
        logits_NV = logits_NV.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits_NV.dtype)[:, None]
    all_logprobs_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    logprob_N = all_logprobs_NV.gather(1, target_N.clamp(min=0).long().unsqueeze(1)).squeeze(1)
    probs_NV = all_logprobs_NV.exp()
    # 0 * -inf (a logit masked out) must count as 0
    entropy_N = -torch.where(probs_NV > 0, probs_NV * all_logprobs_NV, torch.zeros_like(probs_NV)).sum(-1)
    counted_N = target_N >= 0
    return torch.where(counted_N, logprob_N, 0.0), torch.where(counted_N, entropy_N, 0.0)


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature: float | Tensor = 1.0,
    suppressed_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The definition of `fused_linear_logprob`: `logprob_of_logits(hidden @ weight.T, target, temperature)`, where
    suppressed ids have the logit `SUPPRESSED_LOGIT`.

    Holds [N, V] logits several times over: 4 bytes x N x V for each in float32.
    """
    logits_NV = hidden_ND @ weight_VD.T
    for vocab_id in suppressed_ids:
        logits_NV[:, vocab_id] = SUPPRESSED_LOGIT
    return logprob_of_logits(logits_NV, target_N, temperature)


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    loss: LossFunction,
    tokens: TokenVectors,
    temperature: float | Tensor = 1.0,
    suppressed_ids: Sequence[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition of `fused_linear_policy_loss`: the loss of the log-probs of `linear_logprob`, by autograd."""
    return loss(*linear_logprob(hidden_ND, weight_VD, target_N, temperature, suppressed_ids), tokens)


def policy_loss(
    logits_NV: Tensor, target_N: Tensor, loss: LossFunction, tokens: TokenVectors, temperature: float | Tensor = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition of `policy_loss`: the loss of the log-probs of `logprob_of_logits`, by autograd."""
    return loss(*logprob_of_logits(logits_NV, target_N, temperature), tokens)


def prefix_attention(
    query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
) -> Tensor:
    """The definition of `vcr1_kernels.prefix_attention`: one softmax over [T, T] under the tree mask, by autograd.

    Token i sees token j <= i when both are of one group and j is in the prompt or in i's own completion.
    Arguments and result as there.
    """
    num_tokens = query_THC.shape[0]
    group_T = torch.empty(num_tokens, dtype=torch.long)
    branch_T = torch.empty(num_tokens, dtype=torch.long)  # 0: prompt, i: completion i
    for index, group in enumerate(layout):
        group_T[group.start : group.end] = index
        branch_T[group.start : group.prompt_end] = 0
        lengths = torch.tensor(group.completion_lens, dtype=torch.long)
        branch_T[group.prompt_end : group.end] = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), lengths)
    position_T = torch.arange(num_tokens)
    visible_TT = (
        (position_T[:, None] >= position_T[None, :])
        & (group_T[:, None] == group_T[None, :])
        & ((branch_T[None, :] == 0) | (branch_T[:, None] == branch_T[None, :]))
    ).to(query_THC.device)
    repeats = query_THC.shape[1] // key_TKC.shape[1]
    key_THC, value_THC = (x.repeat_interleave(repeats, dim=1) for x in (key_TKC, value_TKC))
    scores_HTT = torch.einsum("qhc,khc->hqk", query_THC, key_THC) * scale
    probs_HTT = torch.softmax(scores_HTT.masked_fill(~visible_TT, float("-inf")), dim=-1)
    return torch.einsum("hqk,khc->qhc", probs_HTT, value_THC)


def rotary(
    query_THC: Tensor,
    key_TKC: Tensor,
    cos: Tensor,
    sin: Tensor,
    sections: Sequence[int] = (),
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of `vcr1_kernels.rotary`: x cos + (-x_2, x_1) sin, in float32 or wider. Arguments as there."""
    wide = torch.promote_types(torch.promote_types(query_THC.dtype, cos.dtype), torch.float32)
    if sections:
        cos, sin = (_of_axes(table_3TC, sections, interleaved) for table_3TC in (cos, sin))
    cos_T1C, sin_T1C = (table_TC.unsqueeze(1).to(wide) for table_TC in (cos, sin))

    def rotated(x_TNC: Tensor) -> Tensor:
        first, second = x_TNC.to(wide).chunk(2, dim=-1)
        return (x_TNC.to(wide) * cos_T1C + torch.cat((-second, first), -1) * sin_T1C).to(x_TNC.dtype)

    return rotated(query_THC), rotated(key_TKC)


def _of_axes(table_3TC: Tensor, sections: Sequence[int], interleaved: bool) -> Tensor:
    """[T, C]: each column of either half from the table of its axis."""
    halves = []
    for half_3Tc in table_3TC.chunk(2, dim=-1):
        if interleaved:
            half_Tc = half_3Tc[0].clone()
            for axis in (1, 2):
                columns = slice(axis, 3 * sections[axis], 3)
                half_Tc[:, columns] = half_3Tc[axis][:, columns]
        else:
            half_Tc = torch.cat([part[axis] for axis, part in enumerate(half_3Tc.split(list(sections), dim=-1))], -1)
        halves.append(half_Tc)
    return torch.cat(halves, dim=-1)


PATCH_PX = 14
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(
    rgb_FHW3: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    patch_px: int = PATCH_PX,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """The definition of `vcr1_kernels.patchify`: the values of the Hugging Face processors of Qwen-VL models.

    Arguments, result [P, C] and ValueError as there; dtype may be float64, too, and all is then computed in it.
    """
    check_frames(rgb_FHW3, patch_px)
    num_frames, height, width, _ = rgb_FHW3.shape
    block_px = 2 * patch_px
    if num_frames % 2:
        rgb_FHW3 = torch.cat((rgb_FHW3, rgb_FHW3[-1:]))
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mean_3 = torch.tensor(mean, dtype=compute_dtype, device=rgb_FHW3.device) * 255.0
    std_3 = torch.tensor(std, dtype=compute_dtype, device=rgb_FHW3.device) * 255.0
    values_FHW3 = ((rgb_FHW3.to(compute_dtype) - mean_3) / std_3).to(dtype)
    blocks = values_FHW3.view(-1, 2, height // block_px, 2, patch_px, width // block_px, 2, patch_px, 3)
    # pair, frame, block row, patch row, y, block column, patch column, x, channel
    rows = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return rows.reshape(-1, 3 * 2 * patch_px * patch_px)
