"""What the fused heads share: input checks, row chunks, and matrix products that accumulate in float32.

Shape letters: N scored tokens, C rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ._ops import add_op_namespace_prefix
from .backend import runs_triton
from .head_rows import exp_rows, gradient_rows
from .input_checks import check_target_dtype, check_tensors
from .row_stats import SUPPRESSED_LOGIT, RowStats, stats_dtype
from .upload import upload

NUM_SMS = 132  # H100 SXM and H200
TILE_ROWS, TILE_COLS = 128, 256  # cuBLAS's usual bfloat16 tile on Hopper
GEMM_TFLOPS, MEMORY_TBS = 680.0, 2.7  # rates that chunks are weighed by: assumed for an H100, not measured here
CHUNK_BYTES = 7 << 29  # logits and their gradient of one chunk: 4,096 rows at V = 152k with float32 logits
HEAD_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
VECTORS_PER_ROW = 64  # numbers of a row beside its matrices: statistics, the loss and its autograd; ours take 32
HAS_MM_OUT_DTYPE = ("cuda", "meta")  # devices where torch.mm gives sums of bfloat16 products in float32


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def num_waves(num_rows: int, hidden_size: int) -> int:
    """How often all multiprocessors work on a tile each in the [C, V] x [V, D] product of backward."""
    tiles = math.ceil(num_rows / TILE_ROWS) * math.ceil(hidden_size / TILE_COLS)
    return math.ceil(tiles / NUM_SMS)


def largest_chunk(vocab_size: int, bytes_per_logit: int) -> int:
    """Rows, a multiple of 128, that CHUNK_BYTES allows."""
    return max(CHUNK_BYTES // (vocab_size * bytes_per_logit) // TILE_ROWS, 1) * TILE_ROWS


def auto_chunk_rows(num_rows: int, hidden_size: int, vocab_size: int, bytes_per_logit: int) -> int:
    """Rows of a chunk, a multiple of 128: N rows in equal chunks, as many as cost least, none above `largest_chunk`.

    k chunks of C rows cost k (waves(C) + p) waves. p: what it costs to read and write the float32 gradient of the
    weight once a chunk, 8 V D bytes, in waves of 2 x 128 x 256 x 132 V FLOPs; 0.83 for a 7B head, 0.48 for a 3B one.
    4,096 rows of a 7B head are one chunk (4 waves, one pass), where 3,584 and 512 would be 4 waves and two passes.
    """
    wave_flop = 2 * TILE_ROWS * TILE_COLS * NUM_SMS
    weight_pass = (8 * hidden_size / MEMORY_TBS) / (wave_flop / GEMM_TFLOPS)
    num_rows = max(num_rows, 1)
    fewest = math.ceil(num_rows / largest_chunk(vocab_size, bytes_per_logit))
    sizes = [_round_up(math.ceil(num_rows / k), TILE_ROWS) for k in range(fewest, 2 * fewest + 1)]

    def cost(rows: int) -> float:
        whole, rest = divmod(num_rows, rows)
        waves = whole * num_waves(rows, hidden_size) + num_waves(rest, hidden_size)
        return waves + weight_pass * math.ceil(num_rows / rows)

    return min(sizes, key=cost)


def check_chunk_rows(chunk_rows: int | None) -> None:
    """ValueError unless it is None or an int >= 1."""
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows is {chunk_rows!r}, wanted an int >= 1, or None to have it chosen")


def head_peak_bytes(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    logits_dtype: torch.dtype = torch.float32,
    chunk_rows: int | None = None,
    trains_weight: bool = True,
) -> int:
    """Most bytes that a fused head holds at a time besides its inputs, over forward and backward, results included,
    with N rows or fewer.

        peak  = gradients + chunk + vectors, or what is handed out where that is more
        chunk     C (V b + max(V l, D (s + 2 b)))   E or d(logits) beside the logits, or beside the scaled operands
        gradients N D b + V D s                     of hidden; of the weight, summed in s
                  N D s                             with a frozen weight (`fused_linear_logprob` keeps d(logprob) in s)
        handed out, when no chunk is left: the gradient in s and its copy in b
        vectors   64 N s                            at most

    N rows, C those of the largest chunk (`largest_chunk`, or the longest sequence of a sequence-level loss), D hidden
    size, V vocabulary; bytes of an element: b of the inputs, l of the logits, s of sums (4, or 8 for float64). On CUDA,
    without the allocator's rounding and cuBLAS's workspace. Kept probabilities of `fused_linear_logprob` are N V b
    more. Scoring alone, without gradients, takes C V l.
    """
    logits = effective_logits_dtype(dtype, logits_dtype).itemsize
    size, sums = dtype.itemsize, stats_dtype(dtype).itemsize
    if chunk_rows is None:
        chunk_rows = largest_chunk(vocab_size, logits + size)
    chunk = vocab_size * size + max(vocab_size * logits, hidden_size * (sums + 2 * size))
    chunk *= min(chunk_rows, num_rows)
    hidden, weight = num_rows * hidden_size, vocab_size * hidden_size
    rounded = size if size < sums else 0
    if trains_weight:
        peak = hidden * size + weight * sums + max(chunk, weight * rounded)
    else:
        peak = hidden * sums + max(chunk, hidden * size)
    return peak + VECTORS_PER_ROW * num_rows * sums


def row_chunks(num_rows: int, chunk_rows: int, sequence_lens: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """[start, stop) of each chunk, in order.

    Without `sequence_lens` all chunks but the last have `chunk_rows` rows. With it a chunk holds whole sequences, as
    many as fit, and a sequence longer than a chunk makes a chunk of its own.
    """
    if sequence_lens is None:
        return [(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]
    chunks: list[tuple[int, int]] = []
    start = stop = 0
    for length in sequence_lens:
        if stop > start and stop + length - start > chunk_rows:
            chunks.append((start, stop))
            start = stop
        stop += length
    return [*chunks, (start, stop)] if stop > start else chunks


def matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a @ b rounded once, to `out_dtype`. bfloat16 operands are multiplied exactly and summed in float32."""
    if a.dtype == out_dtype:
        return a @ b
    if a.device.type in HAS_MM_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=out_dtype)
    return a.to(out_dtype) @ b.to(out_dtype)


def suppress_(logits_CV: Tensor, ids: Sequence[int]) -> Tensor:
    """Fills the columns of these ids, in one launch for each run of neighbours; the host's numbers need no copy."""
    for vocab_id in sorted(ids):
        if vocab_id - 1 not in ids:
            last = next(last for last in itertools.count(vocab_id) if last + 1 not in ids)
            logits_CV[:, vocab_id : last + 1] = SUPPRESSED_LOGIT
    return logits_CV


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. With float32 `total` and bfloat16 operands no product is rounded to bfloat16 before it is added.

    Rounding every chunk's share would drift: bfloat16 sums of positive terms are biased, and entropy sinks with them.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type in HAS_MM_OUT_DTYPE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def temperature_to_scale(temperature: float | Tensor, num_rows: int, like: Tensor) -> Tensor:
    """[N] of 1 / temperature in the dtype of the statistics. ValueError for a temperature <= 0 or a wrong shape."""
    dtype = stats_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        if temperature.shape != (num_rows,):
            raise ValueError(f"temperature has shape {tuple(temperature.shape)}, wanted a number or [{num_rows}]")
        return upload(temperature.detach(), like.device).to(dtype).reciprocal()
    if not isinstance(temperature, Real) or not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature is {temperature!r}, wanted a finite number > 0")
    return torch.full((num_rows,), 1.0 / temperature, dtype=dtype, device=like.device)


def check_head_inputs(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, logits_dtype: torch.dtype) -> None:
    """Raises ValueError or TypeError naming what is wrong with the inputs of a fused head."""
    if isinstance(weight_VD, DTensor) or isinstance(hidden_ND, DTensor):
        raise TypeError(
            "the fused head got a DTensor: call it inside the forward of the module that FSDP wraps, where weights are "
            "plain tensors, or pass weight.full_tensor()"
        )
    check_tensors("the fused head", hidden=hidden_ND, weight=weight_VD, target=target_N)
    shapes = f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, target {tuple(target_N.shape)}"
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"the fused head got {shapes}, wanted [N, D], [V, D], [N]")
    if 0 in weight_VD.shape:
        raise ValueError(f"the fused head got {shapes}, wanted V >= 1 and D >= 1")
    if target_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"the fused head got {shapes}: wanted one target per row of hidden")
    check_target_dtype(target_N)
    if hidden_ND.dtype not in HEAD_DTYPES or hidden_ND.dtype != weight_VD.dtype:
        raise TypeError(
            f"the fused head got hidden {hidden_ND.dtype} and weight {weight_VD.dtype}, wanted bfloat16, "
            "float32 or float64 for both (float16 cannot hold the unnormalised probabilities): cast them first"
        )
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"logits_dtype is {logits_dtype}, wanted torch.float32 or torch.bfloat16")


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would round float32 operands to bfloat16. Devices that have none, such as `meta`, pass."""
    device_type = x.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def effective_logits_dtype(hidden_dtype: torch.dtype, logits_dtype: torch.dtype) -> torch.dtype:
    """`logits_dtype` chooses for bfloat16 inputs; wider inputs keep their own dtype."""
    return logits_dtype if hidden_dtype == torch.bfloat16 else hidden_dtype


class Head(NamedTuple):
    """The inputs of a fused head, and what is made of some rows of them."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    scale_N: Tensor
    logits_dtype: torch.dtype
    triton: bool
    suppressed_ids: Sequence[int] = ()

    def chunks(
        self, chunk_rows: int | None, num_rows: int, sequence_lens: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """`row_chunks` of `num_rows` rows, with chunks of `chunk_rows`, or as many as suit their number.

        Whole sequences fill a chunk badly, so they get the largest one: fewer passes over the weight's gradient.
        """
        vocab_size, hidden_size = self.weight_VD.shape
        bytes_per_logit = self.logits_dtype.itemsize + self.weight_VD.dtype.itemsize
        if chunk_rows is None and sequence_lens is None:
            chunk_rows = auto_chunk_rows(num_rows, hidden_size, vocab_size, bytes_per_logit)
        return row_chunks(num_rows, chunk_rows or largest_chunk(vocab_size, bytes_per_logit), sequence_lens)

    def logits(self, rows: slice | Tensor) -> Tensor:
        logits_CV = matmul(self.hidden_ND[rows], self.weight_VD.T, self.logits_dtype)
        return suppress_(logits_CV, self.suppressed_ids)

    def exp_rows(self, rows: slice | Tensor, logits_CV: Tensor, exp_CV: Tensor | None) -> RowStats:
        return exp_rows(logits_CV, self.target_N[rows], self.scale_N[rows], exp_CV, self.triton)

    def gradient_rows(
        self,
        rows: slice | Tensor,
        logits_CV: Tensor,
        stats: RowStats,
        logprob_grad_C: Tensor,
        entropy_grad_C: Tensor | None,
        grad_CV: Tensor,
    ) -> None:
        gradient_rows(
            logits_CV, self.target_N[rows], self.scale_N[rows], stats, logprob_grad_C, entropy_grad_C, grad_CV,
            self.triton,
        )  # fmt: skip


class HeadGradients:
    """d(loss)/d(hidden) and d(loss)/d(weight), collected chunk by chunk; what is not needed is empty.

    The weight's gradient is float32 for bfloat16 inputs: its rows are sums over thousands of tokens.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool) -> None:
        self._hidden_in_ND, self._weight_in_VD = hidden_ND, weight_VD
        self._need_hidden, self._need_weight = need_hidden, need_weight
        self._total_dtype = stats_dtype(hidden_ND.dtype)
        self.hidden_ND = torch.zeros_like(hidden_ND) if need_hidden else hidden_ND.new_empty(0)
        self._weight_grad_VD: Tensor | None = None  # the first chunk makes it: no pass that only writes zeros

    @property
    def are_needed(self) -> bool:
        return self._need_hidden or self._need_weight

    @property
    def weight_VD(self) -> Tensor:  # noqa: N802 - named like the tensor it is
        """What was added so far, zeros when nothing was."""
        if self._weight_grad_VD is None:
            shape = self._weight_in_VD.shape if self._need_weight else (0,)
            self._weight_grad_VD = self._weight_in_VD.new_zeros(shape, dtype=self._total_dtype)
        return self._weight_grad_VD

    def _add_to_weight(self, a_VC: Tensor, b_CD: Tensor) -> None:
        if self._weight_grad_VD is None:
            self._weight_grad_VD = matmul(a_VC, b_CD, self._total_dtype)
        else:
            add_matmul_(self._weight_grad_VD, a_VC, b_CD)

    def add_rows(self, rows: slice | Tensor, grad_CV: Tensor) -> None:
        """`grad_CV` is d(loss)/d(logits) of these rows."""
        if self._need_hidden:
            self.hidden_ND[rows] = grad_CV @ self._weight_in_VD
        if self._need_weight:
            self._add_to_weight(grad_CV.T, self._hidden_in_ND[rows])

    def add_scaled_rows(self, rows: slice | Tensor, exp_CV: Tensor, coefficient_C: Tensor) -> None:
        """d(loss)/d(logits) of these rows is coefficient * exp_CV: the factor goes into the small operands.

        So the [C, V] matrix that `exp_rows` wrote is multiplied as it is, with no second pass over it.
        """
        if self._need_hidden:
            self.hidden_ND[rows] = (
                matmul(exp_CV, self._weight_in_VD, self._total_dtype)
                .mul_(coefficient_C[:, None])
                .to(self.hidden_ND.dtype)
            )
        if self._need_weight:
            hidden_CD = self._hidden_in_ND[rows]
            self._add_to_weight(exp_CV.T, (hidden_CD * coefficient_C[:, None]).to(hidden_CD.dtype))


@torch.library.custom_op(add_op_namespace_prefix("scale_unless_one"), mutates_args=("x",))
def scale_unless_one_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a scalar tensor.

    On CUDA a factor of 1, as `loss.backward()` gives, costs a launch and no pass over x (4.4 GB of traffic for the
    gradient of a 7B head), and the host does not wait to read it.
    """
    if x.is_cuda and runs_triton("auto", x) and x.is_contiguous():
        from . import head_rows_launch

        head_rows_launch.scale_unless_one_(x, factor)
    elif x.device.type != "cpu" or float(factor) != 1.0:
        x.mul_(factor)


@scale_unless_one_.register_fake
def _(x, factor):
    return None
