"""Kernels that are wrong on purpose, each in one way: the checks of bench.compile_checks must catch every one of them.

Loaded by file path in the process that compiles (Triton reads the source of a kernel from its file).
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from vcr1_kernels.compile_cases import CompileCase


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, num_cols, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Good with MASKED = False: full blocks without a mask."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if MASKED:
            x = tl.load(x_ptr + cols, mask=cols < num_cols, other=0.0)
        else:
            x = tl.load(x_ptr + cols)
        total += x.to(tl.float32)
    tl.store(out_ptr, tl.sum(total))


@triton.jit
def fixed_length_kernel(x_ptr, out_ptr, num_cols: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_cols, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr, tl.sum(total))


@triton.jit(do_not_specialize=["num_cols"])
def any_length_kernel(x_ptr, out_ptr, num_cols, BLOCK: tl.constexpr):
    """Good: one binary for all lengths."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_cols // BLOCK * BLOCK, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr, tl.sum(total))


@triton.jit
def store_narrow_kernel(x_ptr, out_ptr, num_cols, BLOCK: tl.constexpr):
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols).to(tl.float32)
        tl.store(out_ptr + 3 * cols, x.to(tl.bfloat16))


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, num_cols, BLOCK: tl.constexpr):
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + cols, (tl.load(x_ptr + cols) * factor).to(tl.float32))


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile [M, N] of a product; `depth` is a multiple of K."""
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        a = tl.load(a_ptr + rows[:, None] * depth + start + inner[None, :])
        b = tl.load(b_ptr + cols[:, None] * depth + start + inner[None, :])
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], total)


@triton.jit
def wrong_kernel(x_ptr, num_cols, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


def _row_case(name: str, kernel: Any = row_sum_kernel, *, constexprs=None, kinds=None, **fields) -> CompileCase:
    constants = {"BLOCK": 4096, **(constexprs or {})}
    if kernel is row_sum_kernel:
        constants.setdefault("MASKED", False)
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32", "num_cols": "i32", **(kinds or {})}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = tuple(arg for arg in ("x_ptr", "out_ptr") if arg in signature)
    return CompileCase(name, kernel, signature, constants, divisible_by_16=aligned, num_warps=8, **fields)


def _matmul_case(name: str, dtype: str, tile: tuple[int, int, int], precision: str, num_stages: int) -> CompileCase:
    kinds = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32", "depth": "i32"}
    constexprs = {**dict(zip("MNK", tile, strict=True)), "PRECISION": precision}
    return CompileCase(
        name,
        matmul_kernel,
        {**kinds, **dict.fromkeys(constexprs, "constexpr")},
        constexprs,
        divisible_by_16=tuple(kinds),
        num_warps=8,
        num_stages=num_stages,
        expects_wgmma=True,
    )


def compile_cases() -> list[CompileCase]:
    return [
        _row_case("good rows"),
        _row_case("good lengths", any_length_kernel, lengths=("num_cols",)),
        _matmul_case("good dot", "bf16", (128, 256, 64), "tf32", 3),
        _row_case("spills", constexprs={"BLOCK": 32768}, options={"maxnreg": 64}),
        _row_case("narrow loads", constexprs={"MASKED": True}),
        _row_case("narrow stores", store_narrow_kernel, kinds={"out_ptr": "*bf16"}),
        _matmul_case("too much shared memory", "bf16", (128, 256, 64), "tf32", 6),
        _row_case("float64", scale_kernel, kinds={"x_ptr": "*fp32", "factor": "fp64"}),
        _matmul_case("dot on mma", "bf16", (16, 64, 64), "tf32", 3),
        _matmul_case("dot without tensor cores", "fp32", (64, 64, 32), "ieee", 2),
        _row_case("length as constant", fixed_length_kernel, constexprs={"num_cols": 8192}, lengths=("num_cols",)),
        _row_case("length specialised", lengths=("num_cols",)),
        _row_case("not compilable", wrong_kernel),
        replace(_row_case("never launched so", any_length_kernel), divisible_by_16=("x_ptr", "num_cols")),
        replace(_row_case("other arguments"), signature={"x_ptr": "*bf16", "BLOCK": "constexpr"}),
    ]
