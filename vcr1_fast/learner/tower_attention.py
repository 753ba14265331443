"""The vision tower's attention. transformers' own calls once per window, thousands of times for one video.

    flash   all segments of a layer in one variable-length call (vcr1_kernels.varlen_attention), by the same flash
            attention as packed rows; CUDA, half precision
    plain   dense calls, any device and precision: one for all segments of a length that recur from frame to frame

Registered with transformers' AttentionInterface, no model code is forked. Lengths come as host numbers with the call
(`tower_segments`), so that neither of the two waits for a GPU, where transformers reads every length back.

Shape letters: P patches of all videos, H heads, C head dimension; N frames alike, F patches of one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from vcr1_kernels.varlen_attention import varlen_attention

# transformers hands cu_seqlens to implementations with "flash" in their name, and splits the others itself
NAMES = {"flash": "vcr1_flash_varlen", "plain": "vcr1_flash_plain"}
TowerBackend = Literal["flash", "plain"]
Run = tuple[int, tuple[int, ...]]  # N, and the segments of one frame in patches


class TowerSegments(NamedTuple):
    """Patches of each segment, on the host: of the windows, and of the frames that some layers see whole.

    As tensors, because compiled code would be compiled anew for other numbers."""

    window: Tensor  # int64 [windows]
    frame: Tensor  # int64 [frames]

    @classmethod
    def of_lengths(cls, frame: Sequence[int], window: Sequence[int] = ()) -> TowerSegments:
        return cls(torch.tensor(window, dtype=torch.int64), torch.tensor(frame, dtype=torch.int64))

    def of(self, cu_seqlens: Tensor) -> Tensor:
        """Those that end where `cu_seqlens` says, told apart by their number: where it is equal, so are they."""
        return self.window if self.window.numel() + 1 == cu_seqlens.numel() else self.frame


def segment_attention(
    module: Any,
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

    `plain`: frames with the same segments go through dense calls together, 58 frames of 4 windows are one instead of
    232.

    Args:
        module: whose configuration says which of the two it is.
        query, key, value: [1, H, P, C].
        cu_seq_lens_q: int32 [segments + 1] on the device, where each segment starts, and the end.
        tower_segments: None in a stock forward, which must then read the lengths from the device.

    Returns: ([1, P, H, C], None).
    """
    if attention_mask is not None:
        raise ValueError("the tower's attention got a mask, wanted segments by cu_seq_lens_q alone")
    lengths = tower_segments.of(cu_seq_lens_q) if tower_segments is not None else cu_seq_lens_q.diff().cpu()
    if is_one_call(module):
        query_PHC, key_PHC, value_PHC = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return varlen_attention(query_PHC, key_PHC, value_PHC, cu_seq_lens_q, lengths, scaling).unsqueeze(0), None
    segments = tuple(lengths.tolist())
    runs = _runs(segments, tuple(tower_segments.frame.tolist()) if tower_segments is not None else segments)
    sizes = [count * sum(parts) for count, parts in runs]
    tensors = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend_frames(run, part, scaling) for run, part in zip(runs, tensors, strict=True)])[None], None


def _attend_frames(run: Run, tensors: tuple[Tensor, ...], scaling: float) -> Tensor:
    """Query, key and value of N frames alike, [1, H, N F, C] each -> [N F, H, C]."""
    count, segments = run
    if len(set(segments)) == 1:
        count, segments = count * len(segments), segments[:1]
    frames = (x.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1).split(segments, dim=2) for x in tensors)
    attend = nn.functional.scaled_dot_product_attention
    out = [attend(*part, scale=scaling).transpose(1, 2) for part in zip(*frames, strict=True)]
    return torch.cat(out, dim=1).flatten(0, 1) if len(out) > 1 else out[0].flatten(0, 1)


@functools.lru_cache(maxsize=64)
def _runs(lengths: tuple[int, ...], frames: tuple[int, ...]) -> tuple[Run, ...]:
    """Frames in a row whose segments are the same: how many, and the segments of one. Segments end where frames do."""
    runs: list[Run] = []
    remaining = iter(lengths)
    for frame in frames:
        segments: tuple[int, ...] = ()
        while sum(segments) < frame:
            segments += (next(remaining),)
        count = runs.pop()[0] if runs and runs[-1][1] == segments else 0
        runs.append((count + 1, segments))
    return tuple(runs)


def use_tower_attention(tower: Any, backend: TowerBackend) -> None:
    """Switch a tower to one of the two, and its patch embedding to a product. `flash`: CUDA, bfloat16 or float16."""
    for name in NAMES.values():
        AttentionInterface.register(name, segment_attention)
    tower.config._attn_implementation = NAMES[backend]
    for module in tower.modules():
        if type(module) is nn.Conv3d and module.kernel_size == module.stride:
            module.__class__ = PatchProduct


class PatchProduct(nn.Conv3d):
    """The convolution that embeds patches, which takes each whole patch once, as the matrix product that it is: the
    packaged model's takes 0.4 times the CPU time, forward and backward. Weight and names stay those of transformers."""

    def forward(self, input: Tensor) -> Tensor:
        """[P, channels, frames, rows, columns] of one patch each -> [P, width]."""
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)


def is_one_call(tower: Any) -> bool:
    """Whether a layer's attention is one call of a registered operator (`flash`), as compiled blocks need it. `tower`:
    or one of its attentions."""
    return tower.config._attn_implementation == NAMES["flash"]
