"""The vision tower's attention on CUDA, where transformers' own would read every segment's length back from the GPU.

    flash   all segments of a layer in one variable-length call; half precision. Without a flash-attn package
            transformers calls attention once per window, which for one video is thousands of launches.
    plain   one dense call for each segment, any precision

Registered with transformers' AttentionInterface, no model code is forked. Lengths come as host numbers with the call
(`tower_segments`), so that neither of the two waits for the GPU.

Shape letters: P patches of all videos, H heads, C head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface

# transformers hands cu_seqlens to implementations with "flash" in their name, and splits the others itself
NAMES = {"flash": "vcr1_flash_varlen", "plain": "vcr1_flash_plain"}
TowerBackend = Literal["flash", "plain"]


@dataclass(frozen=True, slots=True)
class TowerSegments:
    """Patches of each segment, on the host: of the windows, and of the frames that some layers see whole."""

    window: tuple[int, ...]
    frame: tuple[int, ...]

    def of(self, cu_seqlens: Tensor) -> tuple[int, ...]:
        """Those that end where `cu_seqlens` says, told apart by their number: where it is equal, so are they."""
        return self.window if len(self.window) + 1 == cu_seqlens.numel() else self.frame


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    tower_segments: TowerSegments | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Full attention within each segment, in the calling convention of transformers.

    Args:
        query, key, value: [1, H, P, C].
        cu_seq_lens_q: int32 [segments + 1] on the device, where each segment starts, and the end.
        tower_segments: None in a stock forward, which must then read the lengths from the device.

    Returns: ([1, P, H, C], None).
    """
    _check_mask(attention_mask)
    longest = max(_lengths(tower_segments, cu_seq_lens_q))
    query_PHC, key_PHC, value_PHC = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return flash_varlen(query_PHC, key_PHC, value_PHC, cu_seq_lens_q, longest, scaling).unsqueeze(0), None


def plain_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    tower_segments: TowerSegments | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """`varlen_attention` segment by segment."""
    _check_mask(attention_mask)
    lengths = list(_lengths(tower_segments, cu_seq_lens_q))
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*part, scale=scaling) for part in parts], dim=2).transpose(1, 2), None


def _lengths(segments: TowerSegments | None, cu_seqlens: Tensor) -> tuple[int, ...]:
    return segments.of(cu_seqlens) if segments is not None else tuple(cu_seqlens.diff().tolist())


def _check_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("the tower's attention got a mask, wanted segments by cu_seq_lens_q alone")


def flash_varlen(
    query_PHC: Tensor, key_PHC: Tensor, value_PHC: Tensor, ends: Tensor, max_length: int, scale: float
) -> Tensor:
    """Full attention within each segment [ends[i], ends[i + 1]); CUDA, half precision."""
    flash: Any = torch.ops.aten._flash_attention_forward
    lengths = (max_length, max_length)
    return flash(query_PHC, key_PHC, value_PHC, ends, ends, *lengths, 0.0, False, False, scale=scale)[0]


def use_tower_attention(tower: Any, backend: TowerBackend) -> None:
    """Switch a tower to one of the two. `flash`: CUDA, bfloat16 or float16."""
    AttentionInterface.register(NAMES["flash"], varlen_attention)
    AttentionInterface.register(NAMES["plain"], plain_attention)
    tower.config._attn_implementation = NAMES[backend]
