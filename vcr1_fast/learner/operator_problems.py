"""Small problems as in `kernel_problems`, of what the modules of a model compute beside products and attention.

The plain path is the forward of transformers' own classes; what their products and sizes would add is left out.

Shape letters: T tokens, P patches, H K query and key heads, C head dimension, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vcr1_kernels import reference

from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.kernel_problems import Outputs, Problem, Shapes, normal
from vcr1_fast.learner.model_operators import ModelOperators, mlp_forward, norm_forward, text_rotary, tower_rotary

KERNELS = ("norm", "mlp", "rotary")
ROWS = 67  # no multiple of what a program takes
EPS = 1e-6
Part = tuple[str, Callable[..., Any], Sequence[Tensor], Sequence[Tensor]]  # name, function, leaves, other arguments


def _operators(shapes: Shapes) -> ModelOperators:
    return family_of(SimpleNamespace(model_type=shapes.model_type)).operators


def _outputs(parts: Sequence[Part], dtype: torch.dtype) -> Outputs:
    """Results of each part and the gradients of a random combination of them, in `dtype`."""
    found: Outputs = {}
    for name, function, made, others in parts:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in made]  # swiglu writes over its own
        out = function(*leaves, *(x.to(dtype) for x in others))
        outs = out if isinstance(out, tuple) else (out,)
        cotangents = [normal(x.shape, seed, x.device).to(x.dtype) for seed, x in enumerate(outs, 9)]
        found |= {f"{name} {index}": x.detach() for index, x in enumerate(outs)}
        grads = torch.autograd.grad(outs, leaves, cotangents)
        found |= {f"{name} gradient {index}": grad for index, grad in enumerate(grads)}
    return found


def norm_problem(shapes: Shapes, device: torch.device) -> Problem:
    """Rows of the decoder's width and of the tower's; gradients of rows and weight."""
    made: dict[str, list[Tensor]] = {}
    for name, width in (("decoder", shapes.hidden_size), ("tower", shapes.tower_heads * shapes.tower_head_dim)):
        leaves = normal((ROWS, width), 0, device), 1 + 0.2 * normal((width,), 1, device)
        made[name] = [x.to(shapes.dtype) for x in leaves]
    stock: Any = _operators(shapes).norms[0].forward

    def parts(forward: Callable[..., Tensor]) -> list[Part]:
        def apply(hidden: Tensor, weight: Tensor) -> Tensor:
            return forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), hidden)

        return [(name, apply, leaves, ()) for name, leaves in made.items()]

    def formula(module: Any, hidden: Tensor) -> Tensor:  # transformers' own is in float32
        return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS)

    return Problem(
        run=lambda way: _outputs(parts(norm_forward), shapes.dtype),
        plain=lambda: _outputs(parts(stock), shapes.dtype),
        exact=lambda: _outputs(parts(formula), torch.float64),
    )


def mlp_problem(shapes: Shapes, device: torch.device) -> Problem:
    """What an MLP does between its products, in the decoder's width and in the tower's."""
    widths = {"decoder": shapes.mlp_width, "tower": shapes.tower_mlp_width}
    made = {
        name: [normal((ROWS, width), seed, device).to(shapes.dtype) for seed in range(2)]
        for name, width in widths.items()
    }
    products: Any = {"gate_proj": itemgetter(0), "up_proj": itemgetter(1), "down_proj": lambda x: x}
    module = SimpleNamespace(**products, act_fn=torch.nn.functional.silu)
    stock: Any = _operators(shapes).mlps[0].forward

    def parts(forward: Callable[..., Tensor]) -> list[Part]:
        return [(name, lambda *pair: forward(module, pair), leaves, ()) for name, leaves in made.items()]

    return Problem.of(_outputs, lambda way: parts(mlp_forward), parts(stock), shapes.dtype)


def rotary_problem(shapes: Shapes, device: torch.device) -> Problem:
    """Queries and keys of the decoder and of the tower, called as their attention calls."""
    operators, dims = _operators(shapes), {"text": shapes.head_dim, "tower": shapes.tower_head_dim}
    heads = {"text": (shapes.num_heads, shapes.num_key_heads), "tower": (shapes.tower_heads,) * 2}
    made = {
        name: [normal((ROWS, n, dims[name]), seed, device).to(shapes.dtype) for seed, n in enumerate(heads[name])]
        for name in dims
    }
    by_axis = "mrope_section" in inspect.signature(operators.text.stock).parameters
    third = 3 * (dims["text"] // 2) // 8
    sections = [dims["text"] // 2 - 2 * third, third, third] if by_axis else []
    shape_of = {"text": (3,) if by_axis else (), "tower": ()}
    tables: dict[str, list[Tensor]] = {}
    for name, axes in shape_of.items():
        angles = 100 * normal((*axes, ROWS, dims[name] // 2), 5, device)
        tables[name] = [torch.cat([x, x], -1).to(shapes.dtype) for x in (angles.cos(), angles.sin())]

    def in_batch(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        """With the layout in which the decoder calls it."""

        def call(query_THC: Tensor, key_TKC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            batch = [x.transpose(0, 1).unsqueeze(0) for x in (query_THC, key_TKC)]
            rest = (cos.unsqueeze(-3), sin.unsqueeze(-3), *([sections] if by_axis else []))
            return tuple(x.squeeze(0).transpose(0, 1) for x in function(*batch, *rest))

        return call

    def parts(text: Callable[..., Any], tower: Callable[..., Any]) -> list[Part]:
        return [("text", text, made["text"], tables["text"]), ("tower", tower, made["tower"], tables["tower"])]

    def definition(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rotary(query, key, cos, sin, sections if cos.ndim == 3 else ())

    return Problem(
        run=lambda way: _outputs(parts(in_batch(text_rotary), tower_rotary), shapes.dtype),
        plain=lambda: _outputs(parts(in_batch(operators.text.stock), operators.tower.stock), shapes.dtype),
        exact=lambda: _outputs(parts(definition, definition), torch.float64),
    )
