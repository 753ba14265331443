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
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .prefix_attention_launch import ROW_LAUNCH, row_options
from .prefix_attention_triton import unit_stride
from .prefix_layout import PrefixLayout
from .upload import upload_ints

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # query, key, value, out, lse
HALF_TYPES = (torch.float16, torch.bfloat16)


class Segments(NamedTuple):
    """The segments of one variable-length call. Lengths are host ints: nothing waits for the GPU."""

    cu_q: Tensor  # [B + 1] int32, first query of each segment and the total
    cu_k: Tensor  # [B + 1] int32
    max_q: int
    max_k: int
    causal: bool  # query i of a segment sees key j <= i; the segments of q and k are then equal


class VarlenOps(Protocol):
    """A pair of flash attention calls. lse is [H, T] float32, natural logarithm."""

    @property
    def name(self) -> str: ...

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [T, H, C], lse [H, T])"""
        ...

    def backward(
        self,
        grad_THC: Tensor,
        tensors: Tensors,
        segments: Segments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV, from (query, key, value, out, lse): probabilities are exp(S - lse) for the lse that is given."""
        ...


class AtenOps:
    """The flash attention inside torch (CUDA builds): FlashAttention 2, or what is registered in its place."""

    name = "torch's built-in flash attention"

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(query_THC, key_TKC, value_TKC, *segments[:4], 0.0, segments.causal, False), scale=scale
        )
        return out, lse

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # dropout is 0: the random state is not read, so it needs no values, but its type is checked
        rng_state, unused = grad_THC.new_empty(2, dtype=torch.uint64), grad_THC.new_empty(0, dtype=torch.float32)
        return torch.ops.aten._flash_attention_backward(
            *(grad_THC, *tensors, *segments[:4], 0.0, segments.causal, rng_state, unused), scale=scale
        )


@dataclass(frozen=True)
class PackageOps:
    """flash-attn 2 or 3 from its own package. The names of their arguments were read from the sources of 2.8 and 3."""

    name: str
    forward_function: Callable[..., Any]
    backward_function: Callable[..., Any]
    causal_name: str  # of the backward function: it changed between releases of version 3
    is_version_3: bool

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        extra = {} if self.is_version_3 else {"dropout_p": 0.0}
        out, lse, *_ = self.forward_function(
            *(query_THC, key_TKC, value_TKC),
            **{**_segment_arguments(segments), "softmax_scale": scale, "causal": segments.causal, **extra},
        )
        return out, lse

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in tensors[:3])
        options: dict[str, Any] = {"softmax_scale": scale, self.causal_name: segments.causal, "softcap": 0.0}
        options |= {"window_size_left": -1, "window_size_right": -1}
        options |= {"deterministic": torch.are_deterministic_algorithms_enabled()}
        if not self.is_version_3:
            options |= {"dropout_p": 0.0, "alibi_slopes": None}
        self.backward_function(grad_THC, *tensors, dq=dq, dk=dk, dv=dv, **_segment_arguments(segments), **options)
        return dq, dk, dv


def _segment_arguments(segments: Segments) -> dict[str, Any]:
    return {
        "cu_seqlens_q": segments.cu_q,
        "cu_seqlens_k": segments.cu_k,
        "max_seqlen_q": segments.max_q,
        "max_seqlen_k": segments.max_k,
    }


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)  # a custom_op hides its own


def _package_ops(module: str, forward: str, backward: str, is_version_3: bool) -> PackageOps | str:
    """The functions of an installed package, or why they cannot be used."""
    try:
        namespace = importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    functions = [getattr(namespace, name, None) for name in (forward, backward)]
    if functions[0] is None or functions[1] is None:
        return f"{module} has no {forward} and {backward}"
    wanted = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
    of_forward, of_backward = _parameters(functions[0]), _parameters(functions[1])
    causal = "is_causal" if "is_causal" in of_backward else "causal"
    missing = (wanted | {"causal"}) - of_forward
    missing |= (wanted | {causal, "dq", "dk", "dv", "softcap", "window_size_left", "deterministic"}) - of_backward
    if missing:
        return f"{module} has other arguments than known here (missing {', '.join(sorted(missing))})"
    return PackageOps(module, functions[0], functions[1], causal, is_version_3)


@functools.lru_cache(maxsize=8)
def flash_ops(device: torch.device) -> tuple[VarlenOps | None, str]:
    """The flash attention that runs on a CUDA device, and why it is that one; None where there is none.

    flash-attn 3 on compute capability 9.0, else flash-attn 2, else torch's own. Nothing is tried out: a package counts
    when it is importable and its functions have the arguments that are passed here.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None, f"flash attention wants compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    passed_over: list[str] = []
    if capability[0] == 9:
        found = _package_ops("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", True)
        if isinstance(found, PackageOps):
            return found, "flash-attn 3 is installed"
        passed_over.append(found)
    module = "flash_attn.flash_attn_interface"
    found = _package_ops(module, "_flash_attn_varlen_forward", "_flash_attn_varlen_backward", False)
    if isinstance(found, PackageOps):
        return found, "; ".join(("flash-attn 2 is installed", *passed_over))
    passed_over.append(found)
    if not torch.backends.cuda.is_flash_attention_available():
        return None, "; ".join(("this torch was built without flash attention", *passed_over))
    return AtenOps(), "; ".join(passed_over)


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


def merge_in_torch(out_THC: Tensor, lse_HT: Tensor, out_b: Tensor, lse_b: Tensor, plan: Plan) -> None:
    """`merge_partial` in plain torch."""
    rows = plan.completions
    lse_a = lse_HT[:, rows].clone()
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).T.unsqueeze(-1) for x in (lse_a, lse_b))
    out_THC[rows] = (out_THC[rows] * weight_a + out_b * weight_b).to(out_THC.dtype)
    lse_HT[:, rows] = lse


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # CUDA builds of torch for Windows come without


def merge_partial(out_THC: Tensor, lse_HT: Tensor, out_b: Tensor, lse_b: Tensor, plan: Plan) -> None:
    """Add part (B), out_b [n, H, C] and lse_b [H, n], to the rows it belongs to: in place, in float32.

    lse = logaddexp(lse_a, lse_b);  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
    """
    merge = merge_in_triton if out_THC.is_cuda and _has_triton() else merge_in_torch
    merge(out_THC, lse_HT, out_b, lse_b, plan)


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
        self,
        grad_THC: Tensor,
        tensors: Tensors,
        layout: PrefixLayout,
        scale: float,
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
