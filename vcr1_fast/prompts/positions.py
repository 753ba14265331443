"""M-RoPE positions of a prompt by the original Qwen2.5-VL rule, computed once and handed to learner and engine alike.

transformers' own `get_rope_index` changed its rule between 5.12 and 5.19 (seconds cut to whole numbers; text going on
at start + max(h, w) even when time went further), so the models here always get these explicit positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MERGE = 2  # patches merged along each side into one token, in every published model


def mrope_positions(
    token_ids_L: Tensor,
    grids: Sequence[tuple[int, int, int]],
    second_per_grid_s: Sequence[float],
    video_pad_id: int,
    tokens_per_second: float,
    image_pad_id: int = -1,
) -> Tensor:
    """Time, row and column position of every token: [3, L] int64.

    Rule of the Qwen2.5-VL release (its `get_rope_index`): a text token takes the next position on all three axes. Token
    (i, r, c) of a video takes start + (trunc(i * second_per_grid_s * tokens_per_second), r, c) on the merged grid. The
    text after a video starts at the largest position so far, over all axes, + 1.

    Args:
        token_ids_L: [L] int64, video placeholders expanded.
        grids: (frame pairs, rows, columns) of each video and image in patches, in the order of the prompt; an image is
            a grid of one pair.
        second_per_grid_s: seconds between two steps of each grid's time axis.
        tokens_per_second: of the model's vision config; 2 in the published checkpoints.
        image_pad_id: placeholder of images; -1 where there are none.
    """
    counts = [t * (h // MERGE) * (w // MERGE) for t, h, w in grids]
    is_video_L = ((token_ids_L == video_pad_id) | (token_ids_L == image_pad_id)).tolist()
    assert sum(is_video_L) == sum(counts), f"{sum(is_video_L)} placeholders, but {sum(counts)} tokens of {list(grids)}"
    blocks: list[Tensor] = []
    cursor = position = 0
    for index, ((t, h, w), seconds, count) in enumerate(zip(grids, second_per_grid_s, counts, strict=True)):
        start = is_video_L.index(True, cursor)
        assert all(is_video_L[start : start + count]), f"grid {index} is not the next of the prompt"
        blocks.append(torch.arange(position, position + start - cursor).expand(3, -1))
        position += start - cursor
        blocks.append(_video_block(t, h // MERGE, w // MERGE, seconds, tokens_per_second) + position)
        position = int(blocks[-1].max()) + 1
        cursor = start + count
    blocks.append(torch.arange(position, position + len(is_video_L) - cursor).expand(3, -1))
    return torch.cat(blocks, dim=1)


def _video_block(t: int, rows: int, columns: int, second_per_grid_s: float, tokens_per_second: float) -> Tensor:
    """[3, t * rows * columns] int64, time slowest. float32 and this order of products, as the release has them:
    in float64 a product just below a whole number would be cut to another one."""
    time_t = (torch.arange(t, dtype=torch.float32) * second_per_grid_s * tokens_per_second).long()
    axes = torch.meshgrid(time_t, torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(axes).reshape(3, -1)
