"""Shared-prefix attention by own Triton kernels: host side. Tiles, forward and backward.

One launch does both parts of every query row: its prefix and its own segment, so there is nothing to merge and the
prompt's keys are read in place. Backward is three launches (delta, dQ, dK/dV) without atomics, so it is deterministic.

FLOPs forward, per query head: 4 C (P^2 / 2 + R G P + G R^2 / 2); backward 3.5 times that (7 products against 2: both
backward kernels recompute the scores). Bytes: q, k, v, out once, K and V again for each query tile, mostly from L2.

Shape letters: T packed tokens, H query heads, K key/value heads, C head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flash_routes import Tensors
from .prefix_attention_launch import ROW_LAUNCH, Launch, launch_of, launch_options, row_options
from .prefix_layout import PrefixGroup, PrefixLayout
from .upload import upload_ints

_WANTED_PROGRAMS = 8 * 132  # dK/dV: eight rounds of an H200's 132 multiprocessors even out tiles of unequal length


def own_starts(layout: PrefixLayout) -> list[int]:
    """For every token of the row: first token of its prompt or completion."""
    return [start for group in layout for start, end in group.segments() for _ in range(start, end)]


def _regions(layout: PrefixLayout) -> Iterator[tuple[PrefixGroup, int, int]]:
    """What a tile may not cross: the prompt of a group, and its completions together."""
    for group in layout:
        yield group, group.start, group.prompt_end
        if group.end > group.prompt_end:
            yield group, group.prompt_end, group.end


def query_tiles(layout: PrefixLayout, rows: int, keys: int) -> list[tuple[int, ...]]:
    """Tiles of the forward and dQ kernels, those with most keys first (they set the end of the launch).

    Each is (first row, last row + 1, prefix_start, prefix_end, own_begin, own_full_end): all rows of the tile see the
    prefix and the whole blocks of keys own_begin..own_full_end; the keys from there on are compared one by one.
    """
    own = own_starts(layout)
    tiles: list[tuple[int, ...]] = []
    for group, begin, end in _regions(layout):
        prefix_end = group.prompt_end if begin == group.prompt_end else group.start
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            own_begin = own[first]
            is_one_segment = own[last - 1] == own_begin
            num_full = (first - own_begin) // keys if is_one_segment else 0
            tiles.append((first, last, group.start, prefix_end, own_begin, own_begin + num_full * keys))
    return sorted(tiles, key=lambda tile: tile[2] - tile[3] + tile[4] - tile[1])


def key_tiles(layout: PrefixLayout, keys: int) -> list[tuple[int, ...]]:
    """Tiles of the dK/dV kernel, those seen by most rows first.

    Each is (first key, last key + 1, row_begin, row_full, row_end): rows row_begin..row_full are compared one by one,
    rows row_full..row_end see every key of the tile.
    """
    own = own_starts(layout)
    tiles: list[tuple[int, ...]] = []
    for group, begin, end in _regions(layout):
        segment_end = {start: stop for start, stop in group.segments()}
        for first in range(begin, end, keys):
            last = min(first + keys, end)
            if begin == group.start:
                row_full, row_end = last, group.end
            else:
                row_end = segment_end[own[last - 1]]
                row_full = last if own[first] == own[last - 1] else row_end
            tiles.append((first, last, first, row_full, row_end))
    return sorted(tiles, key=lambda tile: tile[2] - tile[4])


class Tables(NamedTuple):
    """What the kernels read of a layout, int32."""

    forward: Tensor  # [tiles, 6], `query_tiles`
    dq: Tensor  # [tiles, 6], likewise
    dkdv: Tensor  # [tiles, 5], `key_tiles`
    own_start: Tensor  # [T]


@functools.lru_cache(maxsize=16)
def _tables(layout: PrefixLayout, launches: tuple[Launch, Launch, Launch], device: torch.device) -> Tables:
    forward, dq, dkdv = launches
    tiles = [
        query_tiles(layout, forward.rows, forward.keys),
        query_tiles(layout, dq.rows, dq.keys),
        key_tiles(layout, dkdv.keys),
    ]
    flat = [[number for tile in table for number in tile] for table in tiles]
    *sent, own_start = upload_ints([*flat, own_starts(layout)], device)
    forward_tiles, dq_tiles, dkdv_tiles = (x.view(len(table), -1) for x, table in zip(sent, tiles, strict=True))
    return Tables(forward_tiles, dq_tiles, dkdv_tiles, own_start)


def make_tables(layout: PrefixLayout, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """One copy for each layout and device, kept: all layers of a model, forward and backward, read the same tables."""
    forward, dq, dkdv = (launch_of(kernel, head_dim, dtype) for kernel in ("forward", "dq", "dkdv"))
    return _tables(layout, (forward, dq, dkdv), device)


def head_splits(repeats: int, num_tiles: int, num_key_heads: int) -> int:
    """Over how many programs the query heads of one key head are spread in dK/dV: the fewest that fill the GPU."""
    divisors = [n for n in range(1, repeats + 1) if repeats % n == 0]
    return next((n for n in divisors if n * num_tiles * num_key_heads >= _WANTED_PROGRAMS), repeats)


def unit_stride(x_THC: Tensor) -> Tensor:
    """The kernels take any stride of rows and heads, but adjacent elements of a head."""
    return x_THC if x_THC.stride(-1) == 1 else x_THC.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and of heads, in elements."""
    return [stride for x in tensors for stride in x.stride()[:2]]


LOG2E = 1.4426950408889634


class TritonAttention:
    """Back end `triton`: float16, bfloat16 or float32 inputs of one type, head dimension up to 128."""

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [T, H, C] and the natural-log lse [H, T] in float32."""
        from .device.prefix_attention import prefix_forward_kernel

        num_tokens, num_heads, head_dim = query_THC.shape
        query, key, value = (unit_stride(x) for x in (query_THC, key_TKC, value_TKC))
        out_THC = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
        launch = launch_of("forward", head_dim, query.dtype)
        tables = make_tables(layout, head_dim, query.dtype, query.device)
        strides = _strides(query, key, value)
        arguments: list[Any] = [query, key, value, out_THC, lse_HT, tables.forward, tables.own_start, *strides]
        arguments += [num_heads * head_dim, num_tokens, num_heads // key.shape[1], scale * LOG2E]
        prefix_forward_kernel[num_heads, len(tables.forward)](*arguments, **launch_options(head_dim, launch))
        return out_THC, lse_HT

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV; `tensors` is (query, key, value, out, lse_HT) as `forward` took and gave them."""
        from .device.prefix_attention_backward import prefix_delta_kernel, prefix_dkdv_kernel, prefix_dq_kernel

        query, key, value = (unit_stride(x) for x in tensors[:3])
        out, lse_HT = tensors[3].contiguous(), tensors[4]
        grad = grad_THC.contiguous()
        num_tokens, num_heads, head_dim = query.shape
        num_key_heads = key.shape[1]
        repeats = num_heads // num_key_heads
        strides = _strides(query, key, value)
        tables = make_tables(layout, head_dim, query.dtype, query.device)

        delta_HT = torch.empty_like(lse_HT)
        prefix_delta_kernel[num_heads, -(-num_tokens // ROW_LAUNCH.rows)](
            *(grad, out, delta_HT, num_heads * head_dim, num_tokens), **row_options(head_dim)
        )

        dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        launch = launch_of("dq", head_dim, query.dtype)
        arguments: list[Any] = [query, key, value, grad, lse_HT, delta_HT, dq, tables.dq, tables.own_start, *strides]
        arguments += [num_heads * head_dim, num_tokens, repeats, scale * LOG2E, scale]
        prefix_dq_kernel[num_heads, len(tables.dq)](*arguments, **launch_options(head_dim, launch))

        launch = launch_of("dkdv", head_dim, query.dtype)
        splits = head_splits(repeats, len(tables.dkdv), num_key_heads)
        # partial sums in float32: a bfloat16 rounding for each of the query heads would show in dK
        dtype = query.dtype if splits == 1 else torch.float32
        dk, dv = (torch.empty(splits, *key.shape, dtype=dtype, device=key.device) for _ in range(2))
        arguments = [query, key, value, grad, lse_HT, delta_HT, dk, dv, tables.dkdv, tables.own_start, *strides]
        arguments += [num_heads * head_dim, num_key_heads * head_dim, num_tokens, num_key_heads, repeats]
        arguments += [repeats // splits, scale * LOG2E, scale]
        prefix_dkdv_kernel[splits * num_key_heads, len(tables.dkdv)](*arguments, **launch_options(head_dim, launch))
        dk, dv = (x[0] if splits == 1 else x.sum(0).to(key.dtype) for x in (dk, dv))
        return dq, dk, dv
