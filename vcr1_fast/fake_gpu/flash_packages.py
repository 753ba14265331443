"""flash-attn's packages as stand-ins: counted, and nothing runs. Theirs would launch kernels on tensors without values.

The functions take what those of the real releases take, so that the code that binds and calls them runs as it would.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from vcr1_kernels.flash_routes import PACKAGES, Package

FlashVersion = Literal["fa2", "fa3", "fa4"]
FLASH_VERSIONS: tuple[FlashVersion, ...] = ("fa2", "fa3", "fa4")
# query, cu_q, cu_k, is causal, is backward, version
Counted = Callable[[Tensor, Tensor, Tensor, bool, bool, FlashVersion], None]
# Names of the arguments with their defaults, of flash-attn 2.8.3, flash-attn 3 as of 2026 and in 2.8.3's hopper/, and
# flash-attn-4 4.0.0b36 (b30: without the last of its forward's)
SIGNATURES: dict[str, tuple[str, str]] = {
    "fa2": (
        """q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left=-1
        window_size_right=-1 softcap=0.0 alibi_slopes=None return_softmax=False block_table=None leftpad_k=None
        seqused_k=None zero_tensors=False""",
        """dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p
        softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state=None
        zero_tensors=False""",
    ),
    "fa3": (
        """q k v k_new=None v_new=None qv=None out_=None cu_seqlens_q=None cu_seqlens_k=None cu_seqlens_k_new=None
        seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None page_table=None kv_batch_idx=None
        leftpad_k=None rotary_cos=None rotary_sin=None seqlens_rotary=None q_descale=None k_descale=None v_descale=None
        softmax_scale=None causal=False window_size_left=-1 window_size_right=-1 attention_chunk=0 softcap=0.0
        rotary_interleaved=True scheduler_metadata=None num_splits=1 pack_gqa=None sm_margin=0""",
        """dout q k v out softmax_lse cu_seqlens_q=None cu_seqlens_k=None sequed_q=None sequed_k=None max_seqlen_q=None
        max_seqlen_k=None dq=None dk=None dv=None softmax_scale=None is_causal=False window_size_left=-1
        window_size_right=-1 softcap=0.0 deterministic=False sm_margin=0""",
    ),
    "fa3 of 2.8.3": (
        """q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q
        max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale
        v_descale softmax_scale causal window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True
        scheduler_metadata=None num_splits=1 pack_gqa=None sm_margin=0""",
        """dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv
        softmax_scale causal window_size=(-1,-1) softcap=0.0 deterministic=False sm_margin=0""",
    ),
    "fa4": (
        """q k v qv=None cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None
        max_seqlen_k=None min_seqlen_k=None page_table=None softmax_scale=None causal=False softcap=None
        window_size_left=None window_size_right=None learnable_sink=None tile_mn=None mma_pv_is_rs=None
        intra_wg_overlap=None num_threads=384 num_splits=1 pack_gqa=None _arch=None score_mod=None mask_mod=None
        block_sparse_tensors=None return_lse=False out=None lse=None aux_tensors=None aux_scalars=None q_descale=None
        k_descale=None v_descale=None gather_kv_indices=None scheduler_metadata=None seqlen_k_per_split=None
        disable_scheduler_metadata=False gather_bwd_recompute_p=False""",
        """q k v out dout lse softmax_scale=None causal=False softcap=0.0 window_size_left=None window_size_right=None
        m_block_size=64 n_block_size=128 num_threads=256 pack_gqa=False num_stages_Q=2 num_stages_dO=2 SdP_swapAB=False
        dKV_swapAB=False dQ_swapAB=False AtomLayoutMSdP=2 AtomLayoutNdKV=2 AtomLayoutMdQ=2 V_in_regs=False
        cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None
        deterministic=False dq=None dk=None dv=None score_mod=None score_mod_bwd=None mask_mod=None aux_tensors=None
        aux_scalars=None block_sparse_tensors=None dlse=None learnable_sink=None""",
    ),
}
_PACKAGE: dict[FlashVersion, Package] = {
    version: next(package for package in PACKAGES if package.name == f"flash-attn {version[2]}")
    for version in FLASH_VERSIONS
}


def signature(parameters: str) -> inspect.Signature:
    """Of one of the texts in `SIGNATURES`."""
    made = []
    for text in parameters.split():
        name, has_default, default = text.partition("=")
        value = ast.literal_eval(default) if has_default else inspect.Parameter.empty
        made.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(made)


class StandIn:
    """A function with these parameters; `run` gets the arguments by name."""

    def __init__(self, parameters: str, run: Callable[[dict[str, Any]], Any]) -> None:
        self.__signature__ = signature(parameters)
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.__signature__.bind(*args, **kwargs).arguments)


def installed_version() -> FlashVersion | None:
    """The one that a run on compute capability 9.0 would take of this environment; None: torch's own."""
    if importlib.util.find_spec(_PACKAGE["fa3"].module):
        return "fa3"
    if _is_installed("flash-attn-4"):
        return "fa4"
    return "fa2" if _is_installed("flash-attn") else None


def _is_installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def install(version: FlashVersion | None, counted: Counted) -> None:
    """From now on importing this version's package gives a stand-in, and importing another one fails. None: all do."""
    for package in PACKAGES:
        for name in _with_parents(package):
            sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # importing it is an ImportError
    if version is None:
        return
    package = _PACKAGE[version]
    forward, backward = SIGNATURES[version]
    module = ModuleType("")
    for name in _with_parents(package):
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None)
    setattr(module, package.forward, StandIn(forward, functools.partial(_forward, counted, version)))
    setattr(module, package.backward, StandIn(backward, functools.partial(_backward, counted, version)))


def _with_parents(package: Package) -> list[str]:
    parts = package.module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _forward(counted: Counted, version: FlashVersion, arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
    query = arguments["q"]
    counted(query, arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], arguments["causal"], False, version)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    return torch.empty_like(query), lse, *[None] * (3 if version == "fa4" else 2)


def _backward(counted: Counted, version: FlashVersion, arguments: dict[str, Any]) -> None:
    causal = arguments["is_causal" if version == "fa3" else "causal"]
    counted(arguments["q"], arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], causal, True, version)
