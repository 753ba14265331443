"""What each kernel of a run computes with: one value, made when the run starts and handed to whoever computes.

`kernel_proof.choose_kernels` makes it; `KernelChoice()` is the choice without a proof, by the device of the tensors.
The policy takes head, attention and tower from it, whoever cuts frames into patches takes `patchify_backend`.

Shape letters: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from vcr1_kernels import fused_linear_logprob, fused_linear_policy_loss, reference
from vcr1_kernels.backend import Backend
from vcr1_kernels.flash_routes import HALF_TYPES
from vcr1_kernels.losses import LossFunction, TokenVectors
from vcr1_kernels.prefix_attention import AttentionBackend, attention_backend

from vcr1_fast.learner.model_operators import ModelOperators, use_operators
from vcr1_fast.learner.tower_attention import TowerBackend, use_tower_attention

_HEAD_WORDS = {
    "auto": "fused",
    "triton": "fused, Triton rows",
    "torch": "fused, rows in torch",
    "plain": "plain torch, whole logits",
}
_LIGER_WORDS = {"auto": "by device", "liger": "Liger", "plain": "transformers"}
_WORDS = {
    "logprob": _HEAD_WORDS,
    "policy_loss": _HEAD_WORDS,
    "attention": {
        "auto": "packed rows",
        "flash": "packed rows, flash",
        "triton": "packed rows, Triton",
        "torch": "packed rows, dense scores in torch",
    },
    "tower": {"auto": "by device", "flash": "flash, one call a layer", "plain": "dense calls"},
    "patchify": {"auto": "by device", "triton": "Triton", "torch": "torch"},
    "norm": _LIGER_WORDS,
    "mlp": _LIGER_WORDS,
    "rotary": {"auto": "by device", "triton": "Triton", "plain": "transformers"},
}
_LABELS = {"logprob": "log-probs", "policy_loss": "policy loss"}


@dataclass(frozen=True, slots=True)
class Pick:
    """The way one kernel goes, and why."""

    way: str = "auto"  # a key of _WORDS of that kernel; auto: by the tensors' device
    reason: str = ""
    is_fallback: bool = False  # a faster way raised or disagreed; `reason` says how


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A way for each kernel. Example: `KernelChoice(patchify=Pick("torch"))`."""

    logprob: Pick = Pick()
    policy_loss: Pick = Pick()
    attention: Pick = Pick()  # forward and backward together: backward takes what forward left
    tower: Pick = Pick()
    patchify: Pick = Pick()
    norm: Pick = Pick()  # RMSNorm of decoder and tower, as the next two
    mlp: Pick = Pick()  # SwiGLU between an MLP's products
    rotary: Pick = Pick()
    proof: str = ""  # one clause for the run's header: what the choice rests on

    def picks(self) -> Iterator[tuple[str, Pick]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Pick):
                yield field.name, value

    def linear_logprob(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        temperature: float,
        suppressed_ids: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """(log-prob, entropy) [N] of the head: `fused_linear_logprob` or its definition."""
        head = (hidden_ND, weight_VD, target_N, temperature)
        if self.logprob.way == "plain":
            return reference.linear_logprob(*head, suppressed_ids)
        return fused_linear_logprob(*head, backend=cast(Backend, self.logprob.way), suppressed_ids=suppressed_ids)

    def linear_policy_loss(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        loss: LossFunction,
        tokens: TokenVectors,
        temperature: float,
        suppressed_ids: Sequence[int] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, sums) of the head: `fused_linear_policy_loss` or its definition. `tokens` may lie on any device."""
        head = (hidden_ND, weight_VD, target_N, loss)
        if self.policy_loss.way == "plain":
            own = on_device(tokens, hidden_ND.device)
            return reference.linear_policy_loss(*head, own, temperature, suppressed_ids)
        backend = cast(Backend, self.policy_loss.way)
        return fused_linear_policy_loss(*head, tokens, temperature, backend=backend, suppressed_ids=suppressed_ids)

    @property
    def prefix_backend(self) -> AttentionBackend:
        return cast(AttentionBackend, self.attention.way)

    @property
    def patchify_backend(self) -> Backend:
        return cast(Backend, self.patchify.way)

    def switch_operators(self, model: Any, operators: ModelOperators, device: torch.device) -> None:
        """Gives the modules of a model, or of a tower alone, on CUDA their kernels; elsewhere they stay stock."""
        picks = {"norm": self.norm, "mlp": self.mlp, "rotary": self.rotary}
        if device.type == "cuda":
            use_operators(model, operators, [name for name, pick in picks.items() if pick.way != "plain"])

    def switch_tower(self, tower: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Gives a vision tower its attention; flash is for CUDA alone."""
        way = self.tower.way
        if way == "auto" or device.type != "cuda":
            way = "flash" if device.type == "cuda" and dtype in HALF_TYPES else "plain"
        use_tower_attention(tower, cast(TowerBackend, way))

    def describe(self) -> str:
        """For the line a run prints at its start."""
        named = dict(self.picks())
        if named["logprob"] == named["policy_loss"]:
            del named["policy_loss"]
            labels: dict[str, str] = {"logprob": "head"}
        else:
            labels = _LABELS
        parts = [f"{labels.get(name, name)}: {_words(name, pick)}" for name, pick in named.items()]
        return "; ".join([*parts, *([self.proof] if self.proof else [])])


def _words(kernel: str, pick: Pick) -> str:
    words = _WORDS[kernel][pick.way]
    if not pick.reason:
        return words
    return f"{words}, AS A FALLBACK: {pick.reason}" if pick.is_fallback else f"{words} ({pick.reason})"


def on_device(tokens: TokenVectors, device: torch.device) -> TokenVectors:
    """The vectors where the definitions, which are plain torch code, need them."""
    move: Any = lambda vector_N: vector_N.to(device)  # noqa: E731
    return tokens.map(move, tokens.sequence_lens)


def plain_choice(reason: str = "") -> KernelChoice:
    """No kernel at all: every definition in plain torch. `reason`: for the run's header."""
    plain, in_torch = Pick("plain"), Pick("torch")
    return KernelChoice(plain, plain, in_torch, plain, in_torch, plain, plain, plain, reason)


def cpu_choice(dtype: torch.dtype) -> KernelChoice:
    """On the CPU: the torch twins of the kernels, with nothing to compare."""
    attention = attention_backend("cpu", dtype)
    in_torch, plain = Pick("torch"), Pick("plain")
    packed = Pick(attention.name, attention.reason)
    return KernelChoice(in_torch, in_torch, packed, plain, in_torch, plain, plain, plain)
