"""Plain torch in the places of the kernels that the proof calls, so that a test can break one of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import reference

from vcr1_fast.learner import kernel_problems, operator_problems
from vcr1_fast.learner.kernel_choice import on_device
from vcr1_fast.learner.kernel_problems import Shapes
from vcr1_fast.learner.kernel_proof import Subject
from vcr1_fast.settings.config import AlgorithmConfig

# [N, D] x [V, D] and heads as small as the ops take
SMALL = Shapes(torch.bfloat16, 32, 96, 2, 1, 16, 2, 16, 48, 40, temperature=0.9)
SUBJECT = Subject(SMALL, AlgorithmConfig())


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, **_options: Any):
    return reference.linear_logprob(hidden, weight, target, temperature)


def linear_policy_loss(hidden, weight, target, loss, tokens, temperature, **_options: Any):
    tokens = on_device(tokens, hidden.device)
    return reference.linear_policy_loss(hidden, weight, target, loss, tokens, temperature)


def prefix_attention(query, key, value, layout, scale, backend) -> Tensor:
    wide = (x.float() for x in (query, key, value))
    return reference.prefix_attention(*wide, layout, scale).to(value.dtype)


def patchify(rgb_FHW3: Tensor, dtype: torch.dtype, *, backend: str, **cut: Any) -> Tensor:
    return reference.patchify(rgb_FHW3, dtype, **cut)


def varlen_attention(query, key, value, ends, lengths, scale) -> Tensor:
    windows = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        windows.append((torch.softmax(q @ k.mT * scale, -1) @ v).transpose(0, 1))
    return torch.cat(windows).to(value.dtype)


def norm_forward(module: Any, hidden: Tensor) -> Tensor:
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return (normed * module.weight.float()).to(hidden.dtype)


def mlp_forward(module: Any, hidden: Any) -> Tensor:
    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    return module.down_proj((torch.nn.functional.silu(gate.float()) * up.float()).to(up.dtype))


def tower_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rotary(query, key, cos, sin)


STAND_INS: dict[str, Callable[..., Any]] = {
    "fused_linear_logprob": linear_logprob,
    "fused_linear_policy_loss": linear_policy_loss,
    "prefix_attention": prefix_attention,
    "patchify": patchify,
    "varlen_attention": varlen_attention,
    "norm_forward": norm_forward,
    "mlp_forward": mlp_forward,
    "tower_rotary": tower_rotary,  # the decoder's runs its own twin on the CPU
}


def put_stand_ins(monkeypatch: pytest.MonkeyPatch, **broken: Callable[..., Any]) -> None:
    """All of them, with those of `broken` in the places that they name."""
    for name, function in (STAND_INS | broken).items():
        module = kernel_problems if hasattr(kernel_problems, name) else operator_problems
        monkeypatch.setattr(module, name, function)
