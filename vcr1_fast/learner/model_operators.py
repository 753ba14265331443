"""Gives modules of a stock Hugging Face model the kernels of a run: norms, gated MLPs and rotary embeddings.

No model code is forked: an instance gets another `forward`. That of a norm or of an MLP is one line here; that of an
attention is transformers' own code, which finds our rotary function under the name that it looks up. Other models of
the process, of the same classes too, keep theirs.

Shape letters: T tokens, P patches, H K query and key heads, C head dimension.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from vcr1_kernels import rotary

from vcr1_fast.learner.liger_ops import rms_norm, swiglu


@dataclass(frozen=True, slots=True)
class RotaryCall:
    """An attention class, and the names that its forward has for its rotary function, by release of transformers."""

    attention: type[nn.Module]
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The one in use. Raises RuntimeError where the forward calls none of them."""
        called = inspect.unwrap(self.attention.forward).__code__.co_names
        found = [name for name in self.names if name in called]
        if len(found) != 1:
            raise RuntimeError(
                f"{self.attention.__name__}.forward calls none of {', '.join(self.names)}: another transformers "
                "than 5.12 to 5.19"
            )
        return found[0]

    @property
    def stock(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """transformers' own function."""
        return inspect.unwrap(self.attention.forward).__globals__[self.name]


@dataclass(frozen=True, slots=True)
class ModelOperators:
    """Classes of an architecture that the kernels can compute."""

    norms: tuple[type[nn.Module], ...]  # RMSNorm with `weight` and `variance_epsilon`, see `rms_norm`
    mlps: tuple[type[nn.Module], ...]  # down_proj(act_fn(gate_proj(x)) * up_proj(x))
    text: RotaryCall  # (queries [1, H, T, C], keys, cos [1, T, C], sin); before 5.17 [3, 1, T, C] and `mrope_section`
    tower: RotaryCall  # (queries [P, H, C], keys, cos [P, C], sin)


def norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def mlp_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return module.down_proj(swiglu(module.gate_proj(hidden_states), module.up_proj(hidden_states)))


def text_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, mrope_section: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """In place of transformers' function for the decoder, on a packed row: a batch of 1."""
    query_THC, key_TKC = (x.squeeze(0).transpose(0, 1) for x in (query, key))
    out_THC, out_TKC = rotary(query_THC, key_TKC, cos.squeeze(-3), sin.squeeze(-3), mrope_section)
    return out_THC.transpose(0, 1).unsqueeze(0), out_TKC.transpose(0, 1).unsqueeze(0)


def tower_rotary(query_PHC: Tensor, key_PHC: Tensor, cos_PC: Tensor, sin_PC: Tensor) -> tuple[Tensor, Tensor]:
    """In place of transformers' function for the tower."""
    return rotary(query_PHC, key_PHC, cos_PC, sin_PC)


def use_operators(model: nn.Module, operators: ModelOperators, kernels: Collection[str]) -> None:
    """Switches modules of `model` (a whole one, or a tower alone) to `kernels`, of norm, mlp and rotary.

    Raises RuntimeError where an attention looks its rotary function up under no known name, or a kernel of a whole
    model fits no module: what a run says at its start would not be so. A tower alone may have neither norm nor MLP of
    these kinds, as Qwen3-VL's has.
    """
    rotary_calls = {operators.text: text_rotary, operators.tower: tower_rotary}
    forwards: dict[str, dict[type[nn.Module], Callable[..., Any]]] = {
        "norm": dict.fromkeys(operators.norms, norm_forward),
        "mlp": dict.fromkeys(operators.mlps, mlp_forward),
        "rotary": {call.attention: _calling(call, ours) for call, ours in rotary_calls.items()}
        if "rotary" in kernels
        else {},
    }
    is_whole = any(isinstance(module, operators.text.attention) for module in model.modules())
    for kernel in kernels:
        fitting = [m for m in model.modules() if type(m) in forwards[kernel] and _has_silu(m)]
        if not fitting and (is_whole or kernel == "rotary"):
            raise RuntimeError(f"{type(model).__name__} has no module for the kernel {kernel}: set model.kernels=off")
        for module in fitting:
            module.forward = MethodType(forwards[kernel][type(module)], module)


def _has_silu(module: nn.Module) -> bool:
    return isinstance(getattr(module, "act_fn", None), type(ACT2FN["silu"]) | nn.SiLU | None)


@functools.cache
def _calling(call: RotaryCall, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The attention's forward, which finds `function` under the name of its rotary function.

    One for all layers, so that a compiled layer fits all. Without `__name__` among its globals, because torch.compile
    would look the name up in the module of that name.
    """
    forward = inspect.unwrap(call.attention.forward)
    names = {**forward.__globals__, call.name: function}
    del names["__name__"]
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
