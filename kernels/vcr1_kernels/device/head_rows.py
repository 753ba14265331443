"""Row kernels of the language-model head: one program per row of logits [C, V], one exp per element and pass.

Names of the host side (head_rows.py): z raw logits, y target, s = 1 / temperature, c the row's offset,
e_v = exp(s (z_v - c)), others = sum_{v != y} e_v, total = e_y + others.

The offset is the target's own logit: sampled tokens are likely ones, so e does not overflow, no running maximum is
needed, and `others` holds 1 - p_y without cancellation when p_y -> 1. A row whose maximum lies more than GUARD above
the target is done again with its maximum as offset.
"""

import triton
import triton.language as tl

from ..compile_cases import CompileCase

LOG2E = tl.constexpr(1.4426950408889634)
# 4096 columns by 8 warps: 16 values per lane, 128-bit accesses, no spills; a row of 152k is 37 full blocks and a tail
LAUNCH = {"BLOCK": 4096, "num_warps": 8}
GUARD = tl.constexpr(60.0)  # e^60 = 1e26: sums of 2e5 such terms times weights stay far below 3e38


@triton.jit
def _log1p(x):
    # Kahan: the rounding error of 1 + x cancels in the quotient; the interpreter has no libdevice log1p
    u = 1.0 + x
    safe = tl.where(u == 1.0, 2.0, u)
    return tl.where(u == 1.0, x, tl.log(safe) * (x / (safe - 1.0)))


@triton.jit
def _block(
    row_ptr, exp_ptr, cols, mask, others, weighted, largest, offset, scale, target,
    MASKED: tl.constexpr, WITH_EXP: tl.constexpr,
):  # fmt: skip
    """Adds one block of columns to the lane-wise sums; no reduction across lanes until the row is done."""
    if MASKED:
        z = tl.load(row_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(row_ptr + cols).to(tl.float32)
    distance = (z - offset) * scale
    e = tl.exp2(distance * LOG2E)
    if MASKED:
        e = tl.where(mask, e, 0.0)  # -inf - -inf is NaN where the offset is -inf
    if WITH_EXP:
        if MASKED:
            tl.store(exp_ptr + cols, e.to(exp_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(exp_ptr + cols, e.to(exp_ptr.dtype.element_ty))
    others += tl.where(cols == target, 0.0, e)
    weighted += tl.where(e == 0.0, 0.0, e * distance)  # 0 * -inf must be 0
    return others, weighted, tl.maximum(largest, z)


@triton.jit
def _row_sums(
    row_ptr, exp_ptr, offset, scale, target, num_cols,
    BLOCK: tl.constexpr, WITH_EXP: tl.constexpr,
):  # fmt: skip
    """One pass over a row: others, sum of e * distance, and the largest raw logit."""
    others = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    lanes = tl.arange(0, BLOCK)
    num_full = num_cols // BLOCK * BLOCK
    # Full blocks carry no mask: with one, bfloat16 loads become 2 bytes wide where num_cols is not known to be a
    # multiple of 16.
    for start in range(0, num_full, BLOCK):
        cols = start + lanes
        others, weighted, largest = _block(
            row_ptr, exp_ptr, cols, cols >= 0, others, weighted, largest, offset, scale, target,
            False, WITH_EXP,
        )  # fmt: skip
    if num_full < num_cols:
        cols = num_full + lanes
        others, weighted, largest = _block(
            row_ptr, exp_ptr, cols, cols < num_cols, others, weighted, largest, offset, scale, target,
            True, WITH_EXP,
        )  # fmt: skip
    return tl.sum(others, axis=0), tl.sum(weighted, axis=0), tl.max(largest, axis=0)


@triton.jit
def _fill_zero(row_ptr, num_cols, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), row_ptr.dtype.element_ty)
    num_full = num_cols // BLOCK * BLOCK
    for start in range(0, num_full, BLOCK):
        tl.store(row_ptr + start + lanes, zeros)
    if num_full < num_cols:
        cols = num_full + lanes
        tl.store(row_ptr + cols, zeros, mask=cols < num_cols)


# Vectors of one number per row are read one number at a time: their alignment, which a chunk that starts at any row
# changes, must not make Triton compile again.
_ROW_VECTORS = [
    f"{name}_ptr"
    for name in (
        "target", "scale", "logprob", "entropy", "offset", "inv_total", "others", "logprob_grad", "entropy_grad",
    )
]  # fmt: skip
_EXP_VECTORS = _ROW_VECTORS[:7]
_GRADIENT_VECTORS = [name for name in _ROW_VECTORS if name != "logprob_ptr"]


@triton.jit(do_not_specialize_on_alignment=_EXP_VECTORS)
def exp_rows_kernel(
    logits_ptr, exp_ptr, target_ptr, scale_ptr,
    logprob_ptr, entropy_ptr, offset_ptr, inv_total_ptr, others_ptr,
    logits_stride, exp_stride, num_cols,
    BLOCK: tl.constexpr, WITH_EXP: tl.constexpr,
):  # fmt: skip
    """logits row -> log-prob, entropy, and optionally the row of e with -others at the target.

    The row of e times -scale / total is the gradient of the log-prob with respect to the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    out_ptr = exp_ptr + row * exp_stride
    target = tl.load(target_ptr + row).to(tl.int32)
    if target < 0:
        tl.store(logprob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(offset_ptr + row, 0.0)
        tl.store(inv_total_ptr + row, 0.0)
        tl.store(others_ptr + row, 0.0)
        if WITH_EXP:
            _fill_zero(out_ptr, num_cols, BLOCK)
    else:
        scale = tl.load(scale_ptr + row)
        # A target beyond the vocabulary gives NaN: the loss shows it, and no foreign memory is read or written.
        target_logit = tl.load(row_ptr + target, mask=target < num_cols, other=float("nan")).to(tl.float32)
        offset = target_logit
        others, weighted, largest = _row_sums(row_ptr, out_ptr, offset, scale, target, num_cols, BLOCK, WITH_EXP)
        excess = (largest - offset) * scale
        if (excess > GUARD) | (excess != excess):  # NaN: the target's logit is -inf, or a logit is NaN
            offset = largest
            others, weighted, largest = _row_sums(row_ptr, out_ptr, offset, scale, target, num_cols, BLOCK, WITH_EXP)
        target_distance = (target_logit - offset) * scale  # 0 unless the row was done again
        others_and_rest = others + (tl.exp2(target_distance * LOG2E) - 1.0)
        log_total = _log1p(others_and_rest)
        inv_total = 1.0 / (1.0 + others_and_rest)
        tl.store(logprob_ptr + row, target_distance - log_total)
        tl.store(entropy_ptr + row, log_total - weighted * inv_total)
        tl.store(offset_ptr + row, offset)
        tl.store(inv_total_ptr + row, inv_total)
        tl.store(others_ptr + row, others)
        if WITH_EXP:
            tl.debug_barrier()  # another warp stored the target's e before
            tl.store(out_ptr + target, (-others).to(exp_ptr.dtype.element_ty), mask=target < num_cols)


@triton.jit
def _gradient(z, cols, target, offset, scale, inv_total, per_prob, at_target, entropy_grad, log_shift,
              WITH_ENTROPY: tl.constexpr):  # fmt: skip
    distance = (z - offset) * scale
    prob = tl.exp2(distance * LOG2E) * inv_total
    grad = tl.where(cols == target, at_target, per_prob * prob)
    if WITH_ENTROPY:
        grad += tl.where(prob == 0.0, 0.0, entropy_grad * prob * (distance + log_shift))
    return grad


@triton.jit(do_not_specialize_on_alignment=_GRADIENT_VECTORS)
def gradient_rows_kernel(
    logits_ptr, grad_ptr, target_ptr, scale_ptr,
    logprob_grad_ptr, entropy_grad_ptr, entropy_ptr, offset_ptr, inv_total_ptr, others_ptr,
    logits_stride, grad_stride, num_cols,
    BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of one row, from the gradients of its log-prob and entropy. `grad_ptr` may be `logits_ptr`.

    dz_v = s [ g (1[v = y] - p_v) - g_H p_v (log p_v + H) ]
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    out_ptr = grad_ptr + row * grad_stride
    target = tl.load(target_ptr + row).to(tl.int32)
    if target < 0:
        _fill_zero(out_ptr, num_cols, BLOCK)
    else:
        scale = tl.load(scale_ptr + row)
        offset = tl.load(offset_ptr + row)
        inv_total = tl.load(inv_total_ptr + row)
        logprob_grad = tl.load(logprob_grad_ptr + row)
        per_prob = -logprob_grad * scale
        at_target = logprob_grad * scale * tl.load(others_ptr + row) * inv_total  # 1 - p_y, without cancellation
        entropy_grad = 0.0
        log_shift = 0.0
        if WITH_ENTROPY:
            entropy_grad = -tl.load(entropy_grad_ptr + row) * scale
            log_shift = tl.log(inv_total) + tl.load(entropy_ptr + row)  # log p_v + H = distance + log_shift
        lanes = tl.arange(0, BLOCK)
        num_full = num_cols // BLOCK * BLOCK
        for start in range(0, num_full, BLOCK):
            cols = start + lanes
            z = tl.load(row_ptr + cols).to(tl.float32)
            grad = _gradient(z, cols, target, offset, scale, inv_total, per_prob, at_target, entropy_grad, log_shift,
                             WITH_ENTROPY)  # fmt: skip
            tl.store(out_ptr + cols, grad.to(grad_ptr.dtype.element_ty))
        if num_full < num_cols:
            cols = num_full + lanes
            mask = cols < num_cols
            z = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad = _gradient(z, cols, target, offset, scale, inv_total, per_prob, at_target, entropy_grad, log_shift,
                             WITH_ENTROPY)  # fmt: skip
            tl.store(out_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_values"])
def scale_unless_one_kernel(x_ptr, factor_ptr, num_values, BLOCK: tl.constexpr):
    """x *= factor, nothing where the factor is 1. Each program takes every num_programs-th block."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        num_full = num_values.to(tl.int64) // BLOCK * BLOCK
        for first in range(start, num_full, step):
            at = x_ptr + first + lanes
            tl.store(at, (tl.load(at).to(tl.float32) * factor).to(x_ptr.dtype.element_ty))
        if (tl.program_id(0) == 0) & (num_full < num_values):
            at = x_ptr + num_full + lanes
            mask = num_full + lanes < num_values
            x = tl.load(at, mask=mask).to(tl.float32)
            tl.store(at, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def compile_cases() -> list[CompileCase]:
    """Every combination of types that the heads launch; V is a multiple of 16 in all of Qwen's checkpoints."""
    return [
        *(_exp_case(*types) for types in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32"))),
        *(_exp_case(logits, None) for logits in ("fp32", "bf16", "fp16")),
        *(_gradient_case("fp32", "bf16", with_entropy) for with_entropy in (False, True)),
        *(_gradient_case(dtype, dtype, False) for dtype in ("fp32", "bf16", "fp16")),
        *(_scale_case(dtype) for dtype in ("fp32", "bf16")),
    ]


def _case(name: str, kernel, signature: dict[str, str], constexprs: dict, row_pointers: tuple[str, ...]) -> CompileCase:
    constexprs = {"BLOCK": LAUNCH["BLOCK"], **constexprs}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**signature, **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        divisible_by_16=(*row_pointers, *(arg for arg, kind in signature.items() if kind == "i32")),
        num_warps=LAUNCH["num_warps"],
    )


def _exp_case(logits: str, exp: str | None) -> CompileCase:
    vectors = ("scale", "logprob", "entropy", "offset", "inv_total", "others")
    signature = {
        "logits_ptr": f"*{logits}", "exp_ptr": f"*{exp or logits}", "target_ptr": "*i64",
        **{f"{name}_ptr": "*fp32" for name in vectors},
        "logits_stride": "i32", "exp_stride": "i32", "num_cols": "i32",
    }  # fmt: skip
    name = f"exp_rows {logits} -> {exp}" if exp else f"exp_rows {logits}, statistics only"
    return _case(name, exp_rows_kernel, signature, {"WITH_EXP": exp is not None}, ("logits_ptr", "exp_ptr"))


def _gradient_case(logits: str, grad: str, with_entropy: bool) -> CompileCase:
    vectors = ("scale", "logprob_grad", "entropy_grad", "entropy", "offset", "inv_total", "others")
    signature = {
        "logits_ptr": f"*{logits}", "grad_ptr": f"*{grad}", "target_ptr": "*i64",
        **{f"{name}_ptr": "*fp32" for name in vectors},
        "logits_stride": "i32", "grad_stride": "i32", "num_cols": "i32",
    }  # fmt: skip
    name = f"gradient_rows {logits} -> {grad}" + (" with entropy" if with_entropy else "")
    return _case(name, gradient_rows_kernel, signature, {"WITH_ENTROPY": with_entropy}, ("logits_ptr", "grad_ptr"))


def _scale_case(dtype: str) -> CompileCase:
    signature = {"x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "num_values": "i64"}
    return _case(f"scale_unless_one {dtype}", scale_unless_one_kernel, signature, {}, ("x_ptr",))
