"""What backward has of the forward pass, and what it runs again: `model.gradient_checkpointing`.

none: everything is kept. full: of each decoder layer and tower block its input alone, and the block runs again before
its backward. selective: what attention and matrix products gave is kept as well, so that norms, activations, rotary
embeddings and casts run again (torch's selective activation checkpointing). Of products that narrow it is not: an MLP's
last one is never run again, because the recomputation ends before it, and keys and values cost 1.6 % of a layer of 7B.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")  # each takes less memory than the one before

PRODUCTS = ("aten::mm", "aten::addmm")  # their last argument is the weight, [in, out]
KEPT = frozenset(  # by name; flash attention is called inside of vcr1_kernels' two
    """
    aten::mm aten::addmm aten::_scaled_dot_product_flash_attention
    aten::_scaled_dot_product_flash_attention_for_cpu aten::_scaled_dot_product_efficient_attention
    aten::_scaled_dot_product_cudnn_attention
    vcr1_kernels::prefix_attention_forward vcr1_kernels::varlen_attention_forward
    """.split()  # noqa: SIM905 - names in rows read better than a column of them
)


def switch_on(hf: Any, mode: str) -> None:
    """Has the decoder layers and tower blocks of a Hugging Face model recompute as `mode` says; `auto` is none."""
    options = checkpoint_options(mode)
    if options is not None:
        hf.gradient_checkpointing_enable(options)
        # transformers has embeddings ask for a gradient, for torch's older way to recompute; frozen ones need none
        hf.disable_input_require_grads()


def checkpoint_options(mode: str) -> dict[str, Any] | None:
    """Of `torch.utils.checkpoint.checkpoint`; None where nothing is recomputed."""
    if mode not in ("selective", "full"):
        return None
    if mode == "full":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)}


def _policy(_context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator._schema.name
    narrows = name in PRODUCTS and args[-1].shape[0] > args[-1].shape[1]
    return CheckpointPolicy.MUST_SAVE if name in KEPT and not narrows else CheckpointPolicy.PREFER_RECOMPUTE
