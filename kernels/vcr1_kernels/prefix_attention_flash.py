"""Shared-prefix attention by variable-length flash attention: two calls and one merge, the prompt's keys read in place.

    (A) causal, over the segments [prompt, c_1 .. c_G] of every group, q = k = v = the row as it is
    (B) not causal, one segment for each group: queries = its completion rows, keys = its prompt

Rows of one group lie together, so with one group in the row the tensors of (B) are slices. With several groups prompts
are apart from one another, and (B) gathers q (forward), q, out and its gradient (backward) and the prompts' k and v,
each once: 4 C bytes per token and head in bfloat16, read and write. No prompt is ever repeated G times.

Bytes of memory besides the result: out_b 2 n H C and the lses 4 H (T + n) in forward; dq_b 2 n H C, dk_b with dv_b
4 P K C in backward, and what the flash kernel itself takes (FlashAttention 2: float32 dQ, dK and dV per query head).

Shape letters: T packed tokens, n completion tokens, H query heads, K key/value heads, C head dimension, B segments.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .flash_routes import Segments, Tensors, VarlenOps
from .prefix_attention_dense import merge_rows
from .prefix_attention_launch import ROW_LAUNCH, row_options
from .prefix_attention_triton import unit_stride
from .prefix_layout import PrefixLayout
from .upload import upload_ints


@dataclass(frozen=True)
class Plan:
    """What the two calls of one layout take; made once per layout and device, shared by all layers."""

    causal: Segments  # (A)
    prefix: Segments | None  # (B); None when no group has a completion token
    completion_rows: Tensor  # [n] int32, where the rows of (B) lie in the row
    completions: slice | Tensor  # of the row: a slice with one group, else int64 indices [n]
    prompts: slice | Tensor  # of the row: prompts that have completions


def _rows_of(spans: list[tuple[int, int]]) -> list[int]:
    return [row for span in spans for row in range(*span)]


def _ends(spans: list[tuple[int, int]]) -> list[int]:
    return list(accumulate((end - start for start, end in spans), initial=0))


def _longest(spans: list[tuple[int, int]]) -> int:
    return max(end - start for start, end in spans)


@functools.lru_cache(maxsize=16)
def make_plan(layout: PrefixLayout, device: torch.device) -> Plan:
    """Segment tables of both calls, sent in one copy without a wait. Completions without tokens are left out."""
    segments = [span for group in layout for span in group.segments()]
    groups = [group for group in layout if group.end > group.prompt_end]
    queries = [(group.prompt_end, group.end) for group in groups]
    keys = [(group.start, group.prompt_end) for group in groups]
    tables = (_ends(segments), _ends(queries), _ends(keys), _rows_of(queries), _rows_of(keys))
    cu, cu_q, cu_k, completion_rows, prompt_rows = upload_ints(tables, device)
    causal = Segments(cu, cu, _longest(segments), _longest(segments), causal=True)
    if not groups:
        return Plan(causal, None, completion_rows, slice(0, 0), slice(0, 0))
    has_one_group = len(groups) == 1
    return Plan(
        causal,
        Segments(cu_q, cu_k, _longest(queries), _longest(keys), causal=False),
        completion_rows,
        slice(*queries[0]) if has_one_group else completion_rows.long(),
        slice(*keys[0]) if has_one_group else prompt_rows.long(),
    )


def _rows(x_TNC: Tensor, which: slice | Tensor) -> Tensor:
    """A view for a slice, a copy of the rows for indices."""
    return x_TNC[which] if isinstance(which, slice) else x_TNC.index_select(0, which)


def _add_rows(x_TNC: Tensor, which: slice | Tensor, other: Tensor) -> None:
    if isinstance(which, slice):
        x_TNC[which] += other
    else:
        x_TNC.index_add_(0, which, other)  # indices are unique, so the order of additions is fixed


def merge_in_triton(out_THC: Tensor, lse_HT: Tensor, out_b: Tensor, lse_b: Tensor, plan: Plan) -> None:
    """`merge_partial` as one kernel: 6 n H C bytes in half precision and no float32 copies."""
    from .device.prefix_attention import merge_partial_kernel

    num_tokens, num_heads, head_dim = out_THC.shape
    merge_partial_kernel[num_heads, -(-len(out_b) // ROW_LAUNCH.rows)](
        *(out_THC, lse_HT, out_b, lse_b, plan.completion_rows, num_tokens, len(out_b), num_heads * head_dim),
        **row_options(head_dim),
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # CUDA builds of torch for Windows come without


def merge_partial(out_THC: Tensor, lse_HT: Tensor, out_b: Tensor, lse_b: Tensor, plan: Plan) -> None:
    """Add part (B), out_b [n, H, C] and lse_b [H, n], to the rows it belongs to: in place, in float32.

    lse = logaddexp(lse_a, lse_b);  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
    """
    if out_THC.is_cuda and _has_triton():
        merge_in_triton(out_THC, lse_HT, out_b, lse_b, plan)
    else:
        merge_rows(out_THC, lse_HT, out_b, lse_b, plan.completions)


@dataclass(frozen=True)
class FlashAttention:
    """Back end `flash`: float16 or bfloat16 inputs of one type, head dimension a multiple of 8 up to 256.

    Flash backwards add to dQ with atomics, so bits differ between runs unless torch.use_deterministic_algorithms(True).
    """

    ops: VarlenOps

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [T, H, C] and the natural-log lse [H, T] in float32."""
        plan = make_plan(layout, query_THC.device)
        query, key, value = (unit_stride(x) for x in (query_THC, key_TKC, value_TKC))
        out, lse = self.ops.forward(query, key, value, plan.causal, scale)
        out, lse = out.contiguous(), lse.contiguous()
        if lse.shape != (out.shape[1], out.shape[0]):
            raise RuntimeError(
                f"{self.ops.name} gave a log-sum-exp of shape {tuple(lse.shape)}, wanted [H, T] = "
                f"{(out.shape[1], out.shape[0])}; use backend='triton'"
            )
        if plan.prefix is not None:
            key_b, value_b = _rows(key, plan.prompts), _rows(value, plan.prompts)
            out_b, lse_b = self.ops.forward(_rows(query, plan.completions), key_b, value_b, plan.prefix, scale)
            merge_partial(out, lse, out_b.contiguous(), lse_b.contiguous(), plan)
        return out, lse

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, layout: PrefixLayout, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV; `tensors` is (query, key, value, out, lse_HT) as `forward` took and gave them, merged."""
        query, key, value = (unit_stride(x) for x in tensors[:3])
        out, lse = tensors[3:]
        plan = make_plan(layout, query.device)
        grad = grad_THC.contiguous()
        first = self.ops.backward(grad, (query, key, value, out, lse), plan.causal, scale)
        dq, dk, dv = (x.contiguous() for x in first)
        if plan.prefix is not None:
            rows, prompts = plan.completions, plan.prompts
            parts = (_rows(query, rows), _rows(key, prompts), _rows(value, prompts), _rows(out, rows))
            lse_b = lse[:, rows].contiguous()
            dq_b, dk_b, dv_b = self.ops.backward(_rows(grad, rows), (*parts, lse_b), plan.prefix, scale)
            for total, which, part in ((dq, rows, dq_b), (dk, prompts, dk_b), (dv, prompts, dv_b)):
                _add_rows(total, which, part)
        return dq, dk, dv
