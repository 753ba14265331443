"""Which flash attention runs on a GPU, called through one pair of functions: variable-length forward and backward.

    compute capability 9.0   flash-attn 3, then flash-attn 4, then flash-attn 2, then torch's own (version 2)
    8.0 and above            flash-attn 2, then torch's own

A package is called by its own functions. The other way to versions 3 and 4 is `torch.nn.attention.
activate_flash_attention_impl` with torch's operators, and is not taken: it holds for the whole process, so that every
dense attention in it (a decoding engine beside the trainer, a user's own model) would run on that version too, and
raise for what it does not take; and torch 2.13 expects two results of version 4's forward, of which the releases since
4.0.0b30 give four or five. The packages' functions are private to them and change: they are bound to what is passed
here before one is taken (`inspect.signature`), and the reason why one is not is kept for the run's header.

Version 4 and version 2 both install `flash_attn/cute`: of both in one environment the later one has overwritten it.

Shape letters: T packed tokens, H query heads, K key/value heads, C head dimension, B segments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # query, key, value, out, lse


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
        self, grad_THC: Tensor, tensors: Tensors, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dQ, dK, dV, from (query, key, value, out, lse): probabilities are exp(S - lse) for the lse that is given."""
        ...


class AtenOps:
    """The flash attention inside torch (CUDA builds): FlashAttention 2, or what a user has activated in its place."""

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
        # dropout is 0: the random state is not read, but its type is checked
        rng_state = torch.empty(2, dtype=torch.uint64, device=grad_THC.device)
        return torch.ops.aten._flash_attention_backward(
            *(grad_THC, *tensors, *segments[:4], 0.0, segments.causal, rng_state, grad_THC.new_empty(0)), scale=scale
        )


_SEGMENT_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal")  # as in `Segments`
_FORWARD_NAMES = ("q", "k", "v", *_SEGMENT_NAMES, "softmax_scale")
_BACKWARD_NAMES = (
    *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
    *(*_SEGMENT_NAMES, "softmax_scale", "deterministic"),
)
_OTHER_NAMES = {"causal": "is_causal", "softmax_lse": "lse"}  # that some releases give to the same argument
# What some release wants beside those and gives no default to: the value with which it has no effect
_WITHOUT_EFFECT: dict[str, Any] = {
    **{"dropout_p": 0.0, "softcap": 0.0, "window_size_left": -1, "window_size_right": -1, "alibi_slopes": None},
    **dict.fromkeys(("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "page_table", "kv_batch_idx", "leftpad_k")),
    **dict.fromkeys(("seqused_q", "seqused_k", "sequed_q", "sequed_k", "rotary_cos", "rotary_sin", "seqlens_rotary")),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
}


@dataclass(frozen=True)
class BoundFunction:
    """A package's function and how it calls its arguments."""

    function: Callable[..., Any]
    names: tuple[str, ...]  # its names of those passed here, in their order
    constants: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def bind(cls, function: Callable[..., Any], wanted: Sequence[str], constants: Mapping[str, Any]) -> BoundFunction:
        """Raises TypeError, naming the argument, for a function that does not take what is passed here."""
        signature = inspect.signature(getattr(function, "_init_fn", function))  # a custom_op hides its own
        known = signature.parameters
        names = tuple(name if name in known else _OTHER_NAMES.get(name, name) for name in wanted)
        required = [p.name for p in known.values() if p.default is p.empty and p.name not in names]
        constants = {name: _WITHOUT_EFFECT[name] for name in required if name in _WITHOUT_EFFECT} | dict(constants)
        signature.bind(**dict.fromkeys(names), **constants)
        return cls(function, names, constants)

    def __call__(self, *values: Any) -> Any:
        return self.function(**dict(zip(self.names, values, strict=True)), **self.constants)


@dataclass(frozen=True)
class PackageOps:
    """Flash attention of one package, by its own functions."""

    name: str
    forward_function: BoundFunction
    backward_function: BoundFunction

    def forward(
        self, query_THC: Tensor, key_TKC: Tensor, value_TKC: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.forward_function(query_THC, key_TKC, value_TKC, *segments, scale)
        return out, lse

    def backward(
        self, grad_THC: Tensor, tensors: Tensors, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = tuple(x.new_empty(x.shape) for x in tensors[:3])  # contiguous, where queries may be a transposed view
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        self.backward_function(grad_THC, *tensors, *grads, *segments, scale, is_deterministic)
        return grads[0], grads[1], grads[2]


@dataclass(frozen=True)
class Package:
    """Where a release of flash-attn has its two functions."""

    name: str
    module: str
    forward: str
    backward: str
    forward_constants: Mapping[str, Any] = field(default_factory=dict)
    majors: tuple[int, ...] = ()  # of the compute capability; empty: any from 8 on

    def ops(self) -> PackageOps:
        """Raises Exception, of any kind when the package's own import fails, TypeError where nothing binds."""
        namespace = importlib.import_module(self.module)
        functions = [getattr(namespace, name) for name in (self.forward, self.backward)]
        forward = BoundFunction.bind(functions[0], _FORWARD_NAMES, self.forward_constants)
        return PackageOps(self.name, forward, BoundFunction.bind(functions[1], _BACKWARD_NAMES, {}))


# In the order in which they are taken. Arguments were read from flash-attn 2.8.3 (with version 3 in its hopper/), from
# version 3 as of 2026, whose arguments have other names and defaults, and from flash-attn-4 4.0.0b30 and b36.
PACKAGES = (
    Package("flash-attn 3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", majors=(9,)),
    Package(
        *("flash-attn 4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
        forward_constants={"return_lse": True},
        majors=(9,),
    ),
    Package(
        *("flash-attn 2", "flash_attn.flash_attn_interface"),
        *("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    ),
)


def _why_not(package: Package, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        is_absent = f"{package.module}.".startswith(f"{error.name}.")
        return "is not installed" if is_absent else f"wants {error.name}, which is not installed"
    what = "has other functions than known here" if isinstance(error, AttributeError | TypeError) else "cannot be used"
    return f"{what} ({type(error).__name__}: {' '.join(str(error).split()):.160})"


@functools.lru_cache(maxsize=8)
def flash_ops(device: torch.device) -> tuple[VarlenOps | None, str]:
    """The flash attention that runs on a CUDA device, and why none before it in the order does; None where none does.

    Nothing is tried out: a package counts when it can be imported and its functions take what is passed here.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None, f"flash attention wants compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    reasons: list[str] = []
    for package in PACKAGES:
        if package.majors and capability[0] not in package.majors:
            continue
        try:
            return package.ops(), "; ".join(reasons) or "the first choice"
        except Exception as error:  # one built for another torch, or another compiler, fails in its own way
            reasons.append(f"{package.name} {_why_not(package, error)}")
    if not torch.backends.cuda.is_flash_attention_available():
        return None, "; ".join(("this torch was built without flash attention", *reasons))
    return AtenOps(), "; ".join(reasons)
