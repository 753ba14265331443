"""Backward kernels of shared-prefix attention: delta, dQ, and dK with dV. No atomics, so the result is deterministic.

Both walk the tiles of `prefix_attention` (its module docstring has the letters) and recompute P = exp(S - lse) from
the merged lse: 7 products of [M, N] x C against the 5 of a kernel that adds to dQ with atomics.
"""

import triton
import triton.language as tl

from ..compile_cases import CompileCase
from ..prefix_attention_launch import ROW_LAUNCH, shipped_constants
from .prefix_attention import LOG2E, dot, kernel_case, load_rows, store_rows


@triton.jit(do_not_specialize=["num_tokens"])
def prefix_delta_kernel(
    GRAD,  # [T, H, HEAD_DIM] contiguous
    OUT,  # [T, H, HEAD_DIM] contiguous
    DELTA,  # [H, T]
    row_stride,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """delta = sum_c grad * out, the only use of `out` in backward. Reads 2 T H C elements, writes 4 T H bytes."""
    head = tl.program_id(0)
    row_start = tl.program_id(1) * M
    offset = head.to(tl.int64) * HEAD_DIM
    grad = load_rows(GRAD + offset, row_start, row_stride, num_tokens, M, HEAD_DIM, C)
    out = load_rows(OUT + offset, row_start, row_stride, num_tokens, M, HEAD_DIM, C)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    rows = row_start + tl.arange(0, M)
    tl.store(DELTA + head.to(tl.int64) * num_tokens + rows, delta, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def prefix_dq_kernel(
    QUERY,
    KEY,
    VALUE,
    GRAD,  # [T, H, HEAD_DIM] contiguous
    LSE,  # [H, T]
    DELTA,  # [H, T]
    DQ,  # [T, H, HEAD_DIM] contiguous
    TILES,  # as in prefix_forward_kernel
    OWN_START,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    num_tokens,
    repeats,
    qk_scale,
    scale,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """dQ = scale * sum over keys of dS K, dS = P (dP - delta), P = exp(S - lse). Same walk as the forward kernel."""
    head = tl.program_id(0)
    tile = TILES + tl.program_id(1) * 6
    row_start = tl.load(tile)
    row_end = tl.load(tile + 1)
    prefix_start = tl.load(tile + 2)
    prefix_end = tl.load(tile + 3)
    own_begin = tl.load(tile + 4)
    own_full_end = tl.load(tile + 5)
    rows = row_start + tl.arange(0, M)
    own_start = tl.load(OWN_START + rows, mask=rows < row_end, other=0)

    key = KEY + (head // repeats).to(tl.int64) * k_head_stride
    value = VALUE + (head // repeats).to(tl.int64) * v_head_stride
    per_head = head.to(tl.int64) * num_tokens
    q = load_rows(QUERY + head.to(tl.int64) * q_head_stride, row_start, q_row_stride, row_end, M, HEAD_DIM, C)
    grad = load_rows(GRAD + head.to(tl.int64) * HEAD_DIM, row_start, out_row_stride, row_end, M, HEAD_DIM, C)
    lse2 = tl.load(LSE + per_head + rows, mask=rows < row_end, other=0.0) * LOG2E
    delta = tl.load(DELTA + per_head + rows, mask=rows < row_end, other=0.0)
    dq = tl.zeros([M, C], tl.float32)

    num_prefix = (prefix_end - prefix_start) // N
    num_full = num_prefix + (own_full_end - own_begin) // N
    for i in tl.range(0, num_full, num_stages=STAGES):
        start = tl.where(i < num_prefix, prefix_start + i * N, own_begin + (i - num_prefix) * N)
        k = load_rows(key, start, k_row_stride, start + N, N, HEAD_DIM, C)
        v = load_rows(value, start, v_row_stride, start + N, N, HEAD_DIM, C)
        scores = dot(q, k.T, tl.zeros([M, N], tl.float32), DOT_FP32) * qk_scale
        probs = tl.exp2(scores - lse2[:, None])
        grad_probs = dot(grad, v.T, tl.zeros([M, N], tl.float32), DOT_FP32)
        grad_scores = probs * (grad_probs - delta[:, None])
        dq = dot(grad_scores.to(k.dtype), k, dq, DOT_FP32)

    tail_start = prefix_start + num_prefix * N
    num_tail = tl.where(tail_start < prefix_end, 1, 0)
    num_masked = num_tail + (row_end - own_full_end + N - 1) // N
    for i in tl.range(0, num_masked, num_stages=STAGES):
        in_prefix = i < num_tail
        start = tl.where(in_prefix, tail_start, own_full_end + (i - num_tail) * N)
        end = tl.where(in_prefix, prefix_end, row_end)
        k = load_rows(key, start, k_row_stride, end, N, HEAD_DIM, C)
        v = load_rows(value, start, v_row_stride, end, N, HEAD_DIM, C)
        scores = dot(q, k.T, tl.zeros([M, N], tl.float32), DOT_FP32) * qk_scale
        keys = start + tl.arange(0, N)
        first = tl.where(in_prefix, prefix_start, own_start)
        last = tl.where(in_prefix, prefix_end - 1, rows)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        probs = tl.where(visible, tl.exp2(scores - lse2[:, None]), 0.0)
        grad_probs = dot(grad, v.T, tl.zeros([M, N], tl.float32), DOT_FP32)
        grad_scores = probs * (grad_probs - delta[:, None])
        dq = dot(grad_scores.to(k.dtype), k, dq, DOT_FP32)

    store_rows(DQ + head.to(tl.int64) * HEAD_DIM, dq * scale, row_start, out_row_stride, row_end, M, HEAD_DIM, C)


@triton.jit(do_not_specialize=["num_tokens", "heads_per_program"])
def prefix_dkdv_kernel(
    QUERY,
    KEY,
    VALUE,
    GRAD,  # [T, H, HEAD_DIM] contiguous
    LSE,  # [H, T]
    DELTA,  # [H, T]
    DK,  # [splits, T, K, HEAD_DIM] contiguous
    DV,  # likewise
    TILES,  # [n, 5] int32: first key, last key + 1, row_begin, row_full, row_end
    OWN_START,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_row_stride,  # H * HEAD_DIM
    dk_row_stride,  # K * HEAD_DIM
    num_tokens,
    num_key_heads,
    repeats,
    heads_per_program,  # query heads of one key head that one program walks; repeats / splits
    qk_scale,
    scale,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """dK = scale * sum of dS^T Q, dV = sum of P^T grad: one program owns N keys and walks all queries that see them.

    Rows row_begin..row_full are compared with the keys one by one, rows row_full..row_end see all keys of the tile:
    for a prompt tile these are the prompt's later rows and the completions of the group, which follow it directly.
    """
    key_head = tl.program_id(0) % num_key_heads
    split = tl.program_id(0) // num_key_heads
    tile = TILES + tl.program_id(1) * 5
    key_start = tl.load(tile)
    key_end = tl.load(tile + 1)
    row_begin = tl.load(tile + 2)
    row_full = tl.load(tile + 3)
    row_end = tl.load(tile + 4)
    keys = key_start + tl.arange(0, N)

    k = load_rows(KEY + key_head.to(tl.int64) * k_head_stride, key_start, k_row_stride, key_end, N, HEAD_DIM, C)
    v = load_rows(VALUE + key_head.to(tl.int64) * v_head_stride, key_start, v_row_stride, key_end, N, HEAD_DIM, C)
    dk = tl.zeros([N, C], tl.float32)
    dv = tl.zeros([N, C], tl.float32)

    first_head = key_head * repeats + split * heads_per_program
    num_masked = (row_full - row_begin + M - 1) // M  # >= 1: a key sees itself
    for i in tl.range(0, heads_per_program * num_masked, num_stages=STAGES):
        head = (first_head + i // num_masked).to(tl.int64)
        start = row_begin + (i % num_masked) * M
        rows = start + tl.arange(0, M)
        q = load_rows(QUERY + head * q_head_stride, start, q_row_stride, row_full, M, HEAD_DIM, C)
        grad = load_rows(GRAD + head * HEAD_DIM, start, grad_row_stride, row_full, M, HEAD_DIM, C)
        # P = 0 in rows that are not there
        lse2 = tl.load(LSE + head * num_tokens + rows, mask=rows < row_full, other=float("inf")) * LOG2E
        delta = tl.load(DELTA + head * num_tokens + rows, mask=rows < row_full, other=0.0)
        own_start = tl.load(OWN_START + rows, mask=rows < row_full, other=0)
        visible = (keys[:, None] >= own_start[None, :]) & (keys[:, None] <= rows[None, :])
        scores = dot(k, q.T, tl.zeros([N, M], tl.float32), DOT_FP32) * qk_scale
        probs = tl.where(visible, tl.exp2(scores - lse2[None, :]), 0.0)
        dv = dot(probs.to(grad.dtype), grad, dv, DOT_FP32)
        grad_probs = dot(v, grad.T, tl.zeros([N, M], tl.float32), DOT_FP32)
        grad_scores = probs * (grad_probs - delta[None, :])
        dk = dot(grad_scores.to(q.dtype), q, dk, DOT_FP32)

    # Rows past row_end read as q = grad = 0 and delta = 0, so they add exactly 0 and need no mask.
    num_full = (row_end - row_full + M - 1) // M
    divisor = tl.maximum(num_full, 1)  # the loop does not run when it is 0, but a compiler may divide before it
    for i in tl.range(0, heads_per_program * num_full, num_stages=STAGES):
        head = (first_head + i // divisor).to(tl.int64)
        start = row_full + (i % divisor) * M
        rows = start + tl.arange(0, M)
        q = load_rows(QUERY + head * q_head_stride, start, q_row_stride, row_end, M, HEAD_DIM, C)
        grad = load_rows(GRAD + head * HEAD_DIM, start, grad_row_stride, row_end, M, HEAD_DIM, C)
        lse2 = tl.load(LSE + head * num_tokens + rows, mask=rows < row_end, other=0.0) * LOG2E
        delta = tl.load(DELTA + head * num_tokens + rows, mask=rows < row_end, other=0.0)
        scores = dot(k, q.T, tl.zeros([N, M], tl.float32), DOT_FP32) * qk_scale
        probs = tl.exp2(scores - lse2[None, :])
        dv = dot(probs.to(grad.dtype), grad, dv, DOT_FP32)
        grad_probs = dot(v, grad.T, tl.zeros([N, M], tl.float32), DOT_FP32)
        grad_scores = probs * (grad_probs - delta[None, :])
        dk = dot(grad_scores.to(q.dtype), q, dk, DOT_FP32)

    offset = (split.to(tl.int64) * num_tokens * num_key_heads + key_head) * HEAD_DIM
    store_rows(DK + offset, dk * scale, key_start, dk_row_stride, key_end, N, HEAD_DIM, C)
    store_rows(DV + offset, dv, key_start, dk_row_stride, key_end, N, HEAD_DIM, C)


def compile_cases() -> list[CompileCase]:
    """The three kernels for each dtype and head dimension of SHIPPED; dK and dV as float32 partial sums and direct."""
    cases = [
        kernel_case(f"prefix_dq {dtype} {head_dim}", prefix_dq_kernel, dtype, constants, launch)
        for dtype, head_dim, constants, launch in shipped_constants("dq")
    ]
    for dtype, head_dim, constants, launch in shipped_constants("dkdv"):
        for kind, pointer in (("partial", "*fp32"), ("direct", f"*{dtype}")):
            if dtype != "bf16" and kind == "direct":
                continue  # the same stores as `partial` or as bf16 `direct`
            name = f"prefix_dkdv {dtype} {head_dim} {kind}"
            cases.append(kernel_case(name, prefix_dkdv_kernel, dtype, constants, launch, DK=pointer, DV=pointer))
    for dtype in ("bf16", "fp16", "fp32"):
        constants = {"HEAD_DIM": 128, "C": 128, "M": ROW_LAUNCH.rows}
        launch = (ROW_LAUNCH.num_warps, ROW_LAUNCH.stages)
        cases.append(kernel_case(f"prefix_delta {dtype} 128", prefix_delta_kernel, dtype, constants, launch))
    return cases
