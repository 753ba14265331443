"""Triton kernels of shared-prefix attention: one launch for both parts, no atomics, no copy of the prompt's keys.

A row of tokens is cut into tiles on the host (`prefix_attention_triton`). A tile never crosses from a prompt into its
completions or into another group, but it may hold several short completions. What a query row r sees is then

    prefix keys        prefix_start <= key < prefix_end      (none for a prompt tile)
    keys of its own    own_start[r] <= key <= r              (own_start[r]: first token of r's prompt or completion)

Scores are kept in base 2: qk_scale = scale * log2(e). lse is the natural log-sum-exp, [H, T] float32.

Letters: M query rows of a tile, N keys of a tile, C head dimension padded to a power of two (HEAD_DIM is the true one).
DOT_FP32 widens the operands of every product: Triton's interpreter cannot multiply bfloat16.
"""

import triton
import triton.language as tl

from ..compile_cases import CompileCase
from ..prefix_attention_launch import ROW_LAUNCH, shipped_constants

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, DOT_FP32: tl.constexpr):
    # float32 operands: "ieee", because tf32 would leave 3e-4 of error in a path that is chosen for its accuracy
    if DOT_FP32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(base, row_start, row_stride, row_end, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, C: tl.constexpr):
    """[ROWS, C] from row `row_start`; rows at or after `row_end` and columns at or after HEAD_DIM read as 0."""
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, C)
    pointers = base + row_start.to(tl.int64) * row_stride + local[:, None] * row_stride + columns[None, :]
    mask = (row_start + local < row_end)[:, None]
    if HEAD_DIM != C:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    base, values, row_start, row_stride, row_end, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, C: tl.constexpr
):
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, C)
    pointers = base + row_start.to(tl.int64) * row_stride + local[:, None] * row_stride + columns[None, :]
    mask = (row_start + local < row_end)[:, None]
    if HEAD_DIM != C:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def prefix_forward_kernel(
    QUERY,
    KEY,
    VALUE,
    OUT,  # [T, H, HEAD_DIM] contiguous
    LSE,  # [H, T]
    TILES,  # [n, 6] int32: first row, last row + 1, prefix_start, prefix_end, own_begin, own_full_end
    OWN_START,  # [T] int32
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    num_tokens,
    repeats,  # H / K
    qk_scale,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
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

    query = QUERY + head.to(tl.int64) * q_head_stride
    key = KEY + (head // repeats).to(tl.int64) * k_head_stride
    value = VALUE + (head // repeats).to(tl.int64) * v_head_stride
    q = load_rows(query, row_start, q_row_stride, row_end, M, HEAD_DIM, C)

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, C], tl.float32)

    # blocks of keys that every row sees: whole blocks of the prefix, then of the tile's own segment
    num_prefix = (prefix_end - prefix_start) // N
    num_full = num_prefix + (own_full_end - own_begin) // N
    for i in tl.range(0, num_full, num_stages=STAGES):
        start = tl.where(i < num_prefix, prefix_start + i * N, own_begin + (i - num_prefix) * N)
        k = load_rows(key, start, k_row_stride, start + N, N, HEAD_DIM, C)
        scores = dot(q, k.T, tl.zeros([M, N], tl.float32), DOT_FP32) * qk_scale
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(probs, 1)
        v = load_rows(value, start, v_row_stride, start + N, N, HEAD_DIM, C)
        acc = dot(probs.to(v.dtype), v, acc * rescale[:, None], DOT_FP32)
        peak = new_peak

    # the rest of the prefix (0 or 1 block), then the blocks around the diagonal. The first block done has a visible
    # key for every row, so `peak` is finite before a block that a row sees nothing of.
    tail_start = prefix_start + num_prefix * N
    num_tail = tl.where(tail_start < prefix_end, 1, 0)
    num_masked = num_tail + (row_end - own_full_end + N - 1) // N
    for i in tl.range(0, num_masked, num_stages=STAGES):
        in_prefix = i < num_tail
        start = tl.where(in_prefix, tail_start, own_full_end + (i - num_tail) * N)
        end = tl.where(in_prefix, prefix_end, row_end)
        k = load_rows(key, start, k_row_stride, end, N, HEAD_DIM, C)
        scores = dot(q, k.T, tl.zeros([M, N], tl.float32), DOT_FP32) * qk_scale
        keys = start + tl.arange(0, N)
        first = tl.where(in_prefix, prefix_start, own_start)
        last = tl.where(in_prefix, prefix_end - 1, rows)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(probs, 1)
        v = load_rows(value, start, v_row_stride, end, N, HEAD_DIM, C)
        acc = dot(probs.to(v.dtype), v, acc * rescale[:, None], DOT_FP32)
        peak = new_peak

    out = OUT + head.to(tl.int64) * HEAD_DIM
    store_rows(out, acc / total[:, None], row_start, out_row_stride, row_end, M, HEAD_DIM, C)
    lse = (peak + tl.log2(total)) * LN2
    tl.store(LSE + head.to(tl.int64) * num_tokens + rows, lse, mask=rows < row_end)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def merge_partial_kernel(
    OUT,  # [T, H, HEAD_DIM] contiguous; rows of part A come in, merged rows go out
    LSE,  # [H, T]; likewise
    OUT_B,  # [n, H, HEAD_DIM] contiguous
    LSE_B,  # [H, n]
    ROW,  # [n] int32: row of OUT that row i of OUT_B belongs to
    num_tokens,
    num_rows,
    out_row_stride,  # H * HEAD_DIM
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse), lse = logaddexp(lse_a, lse_b), in place, in float32."""
    head = tl.program_id(0)
    local = tl.program_id(1) * M + tl.arange(0, M)
    mask = local < num_rows
    row = tl.load(ROW + local, mask=mask, other=0).to(tl.int64)
    lse_pointers = LSE + head.to(tl.int64) * num_tokens + row
    lse_a = tl.load(lse_pointers, mask=mask, other=0.0)
    lse_b = tl.load(LSE_B + head.to(tl.int64) * num_rows + local, mask=mask, other=0.0)
    larger = tl.maximum(lse_a, lse_b)
    weight_a = tl.exp2((lse_a - larger) * LOG2E)
    weight_b = tl.exp2((lse_b - larger) * LOG2E)
    total = weight_a + weight_b
    tl.store(lse_pointers, larger + tl.log2(total) * LN2, mask=mask)

    columns = tl.arange(0, C)
    mask_MC = mask[:, None] & (columns < HEAD_DIM)[None, :]
    offset = head.to(tl.int64) * HEAD_DIM + columns
    out_pointers = OUT + row[:, None] * out_row_stride + offset[None, :]
    out_a = tl.load(out_pointers, mask=mask_MC, other=0.0).to(tl.float32)
    out_b = tl.load(OUT_B + local.to(tl.int64)[:, None] * out_row_stride + offset[None, :], mask=mask_MC, other=0.0).to(
        tl.float32
    )
    merged = out_a * (weight_a / total)[:, None] + out_b * (weight_b / total)[:, None]
    tl.store(out_pointers, merged.to(OUT.dtype.element_ty), mask=mask_MC)


_FIXED_TYPES = {"LSE": "*fp32", "LSE_B": "*fp32", "DELTA": "*fp32", "TILES": "*i32", "OWN_START": "*i32", "ROW": "*i32"}


def kernel_case(
    name: str, kernel, dtype: str, constants: dict, warps_and_stages: tuple, **pointer_types
) -> CompileCase:
    """A case of one of the attention kernels: argument types follow from the names (capitals are pointers)."""
    num_warps, num_stages = warps_and_stages
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.isupper():
            signature[argument] = pointer_types.get(argument) or _FIXED_TYPES.get(argument, f"*{dtype}")
        else:
            signature[argument] = "fp32" if argument.endswith("scale") else "i32"
    aligned = tuple(a for a, kind in signature.items() if kind.startswith("*") or a.endswith("_stride"))
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible_by_16=aligned,
        lengths=tuple(a for a in ("num_tokens", "num_rows", "heads_per_program") if a in signature),
        num_warps=num_warps,
        num_stages=num_stages,
        expects_wgmma="DOT_FP32" in constants and dtype != "fp32",
    )


def compile_cases() -> list[CompileCase]:
    """Forward for each dtype and head dimension of SHIPPED (80 is computed as 128), and the merge of two parts."""
    cases = [
        kernel_case(f"prefix_forward {dtype} {head_dim}", prefix_forward_kernel, dtype, constants, launch)
        for dtype, head_dim, constants, launch in shipped_constants("forward")
    ]
    for dtype in ("bf16", "fp16"):
        constants = {"HEAD_DIM": 128, "C": 128, "M": ROW_LAUNCH.rows}
        launch = (ROW_LAUNCH.num_warps, ROW_LAUNCH.stages)
        cases.append(kernel_case(f"merge_partial {dtype} 128", merge_partial_kernel, dtype, constants, launch))
    return cases
