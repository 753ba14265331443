"""flash-attn's packages as stand-ins: counted, and nothing runs. Theirs would launch kernels on tensors without values.

The functions have the names and arguments of versions 2.8 and 3, so that the code that calls them runs as it would.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Counted = Callable[[Tensor, Tensor, Tensor, bool, bool], None]  # query, cu_q, cu_k, is causal, is backward
PACKAGES = ("flash_attn_interface", "flash_attn")  # versions 3 and 2; the first one counts, as for a run


def installed_package() -> str:
    """The one that this environment has, or ""."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name)), "")


def install(package: str, counted: Counted) -> None:
    """From now on importing `package` gives a stand-in, and importing another one fails. "": none is installed."""
    for name in (*PACKAGES, "flash_attn.flash_attn_interface"):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # importing it is an ImportError
    if not package:
        return
    modules = [ModuleType(package)]
    if package == "flash_attn":
        modules.append(ModuleType("flash_attn.flash_attn_interface"))
        modules[0].__path__ = []
    names = ("_flash_attn_forward", "_flash_attn_backward")
    if package == "flash_attn":
        names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    for function, name in zip(_functions(counted), names, strict=True):
        setattr(modules[-1], name, function)
    for module in modules:
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def _functions(counted: Counted) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        counted(q, cu_seqlens_q, cu_seqlens_k, causal, False)
        num_tokens, num_heads, _ = q.shape
        return torch.empty_like(q), torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        *,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        softcap: float,
        window_size_left: int,
        window_size_right: int,
        deterministic: bool,
        dropout_p: float = 0.0,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        counted(q, cu_seqlens_q, cu_seqlens_k, causal, True)

    return forward, backward
