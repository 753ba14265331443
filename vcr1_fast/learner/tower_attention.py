"""The vision tower's attention on CUDA, where transformers' own would read every segment's length back from the GPU.

    flash   all segments of a layer in one variable-length call (vcr1_kernels.varlen_attention), by the same flash
            attention as packed rows; half precision. Without a flash-attn package transformers calls attention once
            per window, which for one video is thousands of launches.
    plain   one dense call for each segment, any precision

Registered with transformers' AttentionInterface, no model code is forked. Lengths come as host numbers with the call
(`tower_segments`), so that neither of the two waits for the GPU.

Shape letters: P patches of all videos, H heads, C head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from vcr1_kernels.varlen_attention import varlen_attention

# transformers hands cu_seqlens to implementations with "flash" in their name, and splits the others itself
NAMES = {"flash": "vcr1_flash_varlen", "plain": "vcr1_flash_plain"}
TowerBackend = Literal["flash", "plain"]


class TowerSegments(NamedTuple):
    """Patches of each segment, on the host: of the windows, and of the frames that some layers see whole.

    As tensors, because compiled code would be compiled anew for other numbers."""

    window: Tensor  # int64 [windows]
    frame: Tensor  # int64 [frames]

    @classmethod
    def of_lengths(cls, window: Sequence[int], frame: Sequence[int]) -> TowerSegments:
        return cls(torch.tensor(window, dtype=torch.int64), torch.tensor(frame, dtype=torch.int64))

    def of(self, cu_seqlens: Tensor) -> Tensor:
        """Those that end where `cu_seqlens` says, told apart by their number: where it is equal, so are they."""
        return self.window if self.window.numel() + 1 == cu_seqlens.numel() else self.frame


def flash_attention(
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
    query_PHC, key_PHC, value_PHC = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    lengths = _lengths(tower_segments, cu_seq_lens_q)
    return varlen_attention(query_PHC, key_PHC, value_PHC, cu_seq_lens_q, lengths, scaling).unsqueeze(0), None


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
    """`flash_attention` segment by segment."""
    _check_mask(attention_mask)
    lengths = _lengths(tower_segments, cu_seq_lens_q).tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*part, scale=scaling) for part in parts], dim=2).transpose(1, 2), None


def _lengths(segments: TowerSegments | None, cu_seqlens: Tensor) -> Tensor:
    return segments.of(cu_seqlens) if segments is not None else cu_seqlens.diff().cpu()


def _check_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("the tower's attention got a mask, wanted segments by cu_seq_lens_q alone")


def use_tower_attention(tower: Any, backend: TowerBackend) -> None:
    """Switch a tower to one of the two. `flash`: CUDA, bfloat16 or float16."""
    AttentionInterface.register(NAMES["flash"], flash_attention)
    AttentionInterface.register(NAMES["plain"], plain_attention)
    tower.config._attn_implementation = NAMES[backend]


def is_one_call(tower: Any) -> bool:
    """Whether a layer's attention is one call of a registered operator (`flash`), as compiled blocks need it."""
    return tower.config._attn_implementation == NAMES["flash"]
