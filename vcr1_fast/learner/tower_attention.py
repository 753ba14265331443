"""The vision tower's attention on CUDA: all windows of a layer in one variable-length call.

Without a flash-attn package transformers calls attention once per window, which for one video is thousands of launches.
Registered under one name with transformers' AttentionInterface; no model code is forked.

Shape letters: P patches of all videos, H heads, C head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOWER_ATTENTION = "vcr1_flash_varlen"  # transformers hands cu_seqlens to implementations with "flash" in their name


def tower_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Full attention within each segment, in the calling convention of transformers.

    Args:
        query, key, value: [1, H, P, C].
        cu_seq_lens_q: [segments + 1] where each segment starts, and the end; max_length_q: patches of the longest.

    Returns: ([1, P, H, C], None).
    """
    if attention_mask is not None:
        raise ValueError("the tower's attention got a mask, wanted segments by cu_seq_lens_q alone")
    ends = cu_seq_lens_q.to(device=query.device, dtype=torch.int32)
    query_PHC, key_PHC, value_PHC = (x[0].transpose(0, 1) for x in (query, key, value))
    return flash_varlen(query_PHC, key_PHC, value_PHC, ends, int(max_length_q), scaling).unsqueeze(0), None


def flash_varlen(
    query_PHC: Tensor, key_PHC: Tensor, value_PHC: Tensor, ends: Tensor, max_length: int, scale: float
) -> Tensor:
    """Full attention within each segment [ends[i], ends[i + 1]); CUDA, half precision."""
    flash: Any = torch.ops.aten._flash_attention_forward
    lengths = (max_length, max_length)
    return flash(query_PHC, key_PHC, value_PHC, ends, ends, *lengths, 0.0, False, False, scale=scale)[0]


def use_varlen_tower(visual: PreTrainedModel) -> None:
    """Switch a tower to one call a layer. CUDA, bfloat16 or float16."""
    AttentionInterface.register(TOWER_ATTENTION, tower_attention)
    visual.config._attn_implementation = TOWER_ATTENTION
