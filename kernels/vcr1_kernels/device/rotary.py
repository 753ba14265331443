"""The rotary kernel: queries and keys are read and written once, tables once for every HEADS heads, from the cache.

A program rotates TOKENS tokens of HEADS heads; the second dimension of the grid runs over the heads of queries, then of
keys. A lane holds columns i of both halves of a head, 16 bytes of each in half precision.
"""

from typing import Any

import triton
import triton.language as tl

from ..compile_cases import CompileCase

LAUNCH: dict[str, Any] = {"TOKENS": 16, "HEADS": 4, "num_warps": 4, "num_stages": 1}


@triton.jit
def _table(
    ptr, axis_stride, column, mask, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A half of a table in float32. Sections of 0: of one axis. Else each column is of the axis of its section."""
    if FIRST + SECOND + THIRD == 0:
        return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    if INTERLEAVED:
        axis = column % 3
        axis = tl.where(((axis == 1) & (column < 3 * SECOND)) | ((axis == 2) & (column < 3 * THIRD)), axis, 0)
        is_first, is_second, is_third = axis == 0, axis == 1, axis == 2
    else:
        is_first, is_third = column < FIRST, column >= FIRST + SECOND
        is_second = (column >= FIRST) & (column < FIRST + SECOND)
    value = tl.load(ptr, mask=mask & is_first[None, :], other=0.0)
    value += tl.load(ptr + axis_stride, mask=mask & is_second[None, :], other=0.0)
    value += tl.load(ptr + 2 * axis_stride, mask=mask & is_third[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def _rotate(
    x_ptr, out_ptr, token_stride, head_stride, num_heads, head, block, token, column, mask,
    cos_0, cos_1, sin_0, sin_1, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    x_ptr += block * TOKENS * token_stride + head.to(tl.int64) * head_stride
    out_ptr += block * TOKENS * num_heads * (2 * HALF) + head * (2 * HALF)
    x_ptr = x_ptr + token[:, None] * token_stride + column[None, :]
    out_ptr = out_ptr + token[:, None] * (num_heads * (2 * HALF)) + column[None, :]
    for i in tl.static_range(HEADS):
        is_head = mask & (head + i < num_heads)
        x_0 = tl.load(x_ptr + i * head_stride, mask=is_head, other=0.0).to(tl.float32)
        x_1 = tl.load(x_ptr + i * head_stride + HALF, mask=is_head, other=0.0).to(tl.float32)
        tl.store(out_ptr + i * (2 * HALF), x_0 * cos_0 - x_1 * sin_0, mask=is_head)
        tl.store(out_ptr + i * (2 * HALF) + HALF, x_1 * cos_1 + x_0 * sin_1, mask=is_head)


@triton.jit(do_not_specialize=["num_tokens", "axis_stride"])
def rotary_kernel(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, cos_ptr, sin_ptr,
    query_stride, query_head_stride, key_stride, key_head_stride, axis_stride, num_tokens, num_queries, num_keys,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Strides in elements. Columns of a head are adjacent; results and each axis of a table are contiguous.

    COLUMNS: the power of two that HALF columns fit into. INVERSE: rotates back, which is the gradient.
    """
    block = tl.program_id(0).to(tl.int64)
    token, column = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    mask = (block * TOKENS + token < num_tokens)[:, None] & (column < HALF)[None, :]
    place = block * TOKENS * (2 * HALF) + token[:, None] * (2 * HALF) + column[None, :]
    cos_0 = _table(cos_ptr + place, axis_stride, column, mask, FIRST, SECOND, THIRD, INTERLEAVED)
    cos_1 = _table(cos_ptr + place + HALF, axis_stride, column, mask, FIRST, SECOND, THIRD, INTERLEAVED)
    sin_0 = _table(sin_ptr + place, axis_stride, column, mask, FIRST, SECOND, THIRD, INTERLEAVED)
    sin_1 = _table(sin_ptr + place + HALF, axis_stride, column, mask, FIRST, SECOND, THIRD, INTERLEAVED)
    if INVERSE:
        sin_0, sin_1 = -sin_1, -sin_0
    query_groups = tl.cdiv(num_queries, HEADS)
    group = tl.program_id(1)
    if group < query_groups:
        _rotate(
            query_ptr, query_out_ptr, query_stride, query_head_stride, num_queries, group * HEADS, block, token,
            column, mask, cos_0, cos_1, sin_0, sin_1, TOKENS, HEADS, HALF,
        )  # fmt: skip
    else:
        _rotate(
            key_ptr, key_out_ptr, key_stride, key_head_stride, num_keys, (group - query_groups) * HEADS, block, token,
            column, mask, cos_0, cos_1, sin_0, sin_1, TOKENS, HEADS, HALF,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The decoder's launches and the tower's, whose tables are float32; back again; and those of tables by axis."""

    def case(name: str, dtype: str, table: str, half: int, sections: tuple[int, ...] = (0, 0, 0), **changes: Any):
        pointers = ("query_ptr", "key_ptr", "query_out_ptr", "key_out_ptr")
        tables = ("cos_ptr", "sin_ptr")
        strides = ("query_stride", "query_head_stride", "key_stride", "key_head_stride")
        numbers = (*strides, "axis_stride", "num_tokens", "num_queries", "num_keys")
        constants = {"HALF": half, "COLUMNS": triton.next_power_of_2(half)}
        constants |= dict(zip(("FIRST", "SECOND", "THIRD"), sections, strict=True))
        constants |= {"INTERLEAVED": False, "INVERSE": False, "TOKENS": LAUNCH["TOKENS"], "HEADS": LAUNCH["HEADS"]}
        return CompileCase(
            name=f"rotary {dtype} {2 * half}{name}",
            kernel=rotary_kernel,
            signature={
                **dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(tables, f"*{table}"),
                **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr"),
            },
            constexprs=constants | {key: value for key, value in changes.items() if key in constants},
            divisible_by_16=(*pointers, *tables, *strides),
            lengths=("num_tokens",),
            num_warps=LAUNCH["num_warps"],
            num_stages=LAUNCH["num_stages"],
            min_access_bytes=changes.get("min_access_bytes", 16),
        )  # fmt: skip

    return [
        case("", "bf16", "bf16", 64),
        case(" back", "bf16", "bf16", 64, INVERSE=True),
        case("", "fp16", "fp16", 64),
        case("", "fp32", "fp32", 64),
        case(" tower", "bf16", "fp32", 40),
        case(" tower back", "bf16", "fp32", 40, INVERSE=True),
        # a table's columns are masked by their axis, one by one: 2 bytes a load, of 2 rows in 2 + HEADS
        case(" sections", "bf16", "bf16", 64, (16, 24, 24), min_access_bytes=2),
        case(" interleaved", "bf16", "bf16", 64, (24, 20, 20), INTERLEAVED=True, min_access_bytes=2),
    ]
