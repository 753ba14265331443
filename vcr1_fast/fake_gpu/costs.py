"""What one operation costs, from the shapes it is called with: FLOPs, bytes, and whether it launches a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# operations that only make another view, or memory that nothing has written yet
NO_KERNEL = frozenset(
    """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided chunk data detach device diagonal empty empty_like
    empty_strided expand is_pinned is_same_size lift_fresh narrow new_empty new_empty_strided permute record_stream
    reshape resize_ select set_ size slice split split_with_sizes squeeze squeeze_ swapaxes t t_ transpose transpose_
    unbind unfold unsqueeze unsqueeze_ view view_as view_as_real wait_tensor
    """.split()  # noqa: SIM905 - names in rows read better than a column of them
)
# FSDP's copies into and out of its flat buffers
SHARDING = frozenset({"all_gather_copy_in", "split_with_sizes_copy", "chunk_cat", "_foreach_copy_"})
# waits for the GPU, because the size of the result depends on values
READS_VALUES = frozenset({"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"})
# arguments of Triton kernels that are read and then written over
OVERWRITTEN = {"_swiglu_backward_kernel": (1, 2)}
# one launch takes so many tensors: chunks of torch's multi-tensor kernels
TENSORS_PER_LAUNCH = {"_foreach": 100, "_fused_adam": 24}


def gemm_flop(name: str, arguments: Sequence[Any]) -> int:
    """2 m k n of a matrix product or a convolution; 0 of anything else."""
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = arguments[:2] if name in ("mm", "bmm") else arguments[1:3]
        return 2 * a.numel() * b.shape[-1]
    if name == "convolution":  # the patch embedding: kernel = stride = patch
        values, weight = arguments[:2]
        return 2 * values.shape[0] * weight.numel()
    if name == "convolution_backward":
        _grad, values, weight = arguments[:3]
        return 2 * values.shape[0] * weight.numel() * sum(map(bool, arguments[-1][:2]))
    return 0


def attention_flop(width: int, query_lens: Sequence[int], key_lens: Sequence[int], is_causal: bool) -> int:
    """4 x (query, key) pairs x heads x head dimension of a forward; a backward takes 2.5 times that (5 products of 2).

    width: heads x head dimension.
    """
    pairs = sum(q * (q + 1) // 2 if is_causal else q * k for q, k in zip(query_lens, key_lens, strict=True))
    return 4 * width * pairs


def moved_bytes(*values: Any) -> int:
    """Of all fake tensors in arguments and results; a broadcast one counts what its memory holds."""
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in tree_leaves(values)
        if isinstance(x, Tensor) and x.device.type == "cuda"
    )


def num_operations(arguments: Sequence[Any], result: Any) -> int:
    """Of a kernel that is neither product nor attention: one for each element of the largest argument or result."""
    return max(sum(x.numel() for x in tree_leaves(value) if isinstance(x, Tensor)) for value in (*arguments, result))


GEMM, ATTENTION = "matrix product", "attention"  # how names of such kernels begin, whichever library has them


def attention_name(is_backward: bool) -> str:
    return f"{ATTENTION}, {'backward' if is_backward else 'forward'}"


def num_launches(name: str, arguments: Sequence[Any]) -> int:
    """Of one operation that launches; those on lists of tensors take many at once."""
    for prefix, limit in TENSORS_PER_LAUNCH.items():
        if name.startswith(prefix):
            return -(-len(arguments[0]) // limit)
    return 1
