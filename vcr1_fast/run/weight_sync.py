"""Learner weights -> rollout engine, under checkpoint names, with a new version number.

Called by the training loop after each round of updates, and once before the first rollout.

Protocol. All ranks call `push` at the same point. In the order of the state dict, each weight is gathered whole
(one collective per weight, the same order on every rank) and handed to this rank's engine through a lazy iterator, so
that beside the shards and what the engine keeps (rollout/sgl/delivery.py) at most one whole tensor exists at a time.
The first push carries every weight; later ones leave out what is frozen, so an engine keeps what a push does not name.
With LoRA a matrix that has an adapter travels as the sum of both; with `adapters_only` the matrices travel once, as
they were at the start, and the adapters' factors each time, behind them.
Tied weights travel once, under the name that `save_pretrained` keeps. An engine must copy what it gets before it asks
for the next tensor: on one process the tensors are the learner's own. The version counts pushes: 1 after the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vcr1_fast.learner.lora import has_adapter, merged, scale_of, split_weights
from vcr1_fast.learner.sharding import whole_tensor
from vcr1_fast.rollout.engine import RolloutEngine


@dataclass(frozen=True, slots=True)
class PushReport:
    """What one push did."""

    policy_version: int  # the engine's version from now on
    num_tensors: int
    num_bytes: int  # handed to this rank's engine
    duration_s: float


class WeightSync:
    """Keeps one engine at the learner's weights. See the module's docstring for the protocol.

    Example: `WeightSync(policy, engine).push()` before the first rollout, then `.push()` after each update.
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: RolloutEngine,
        *,
        dtype: torch.dtype | None = None,
        policy_version: int = 0,
        skips_frozen: bool = True,
        adapters_only: bool = False,
    ) -> None:
        """`dtype`: cast floating weights to it before they are gathered (bfloat16 halves the traffic); None: as stored.
        `policy_version`: of the weights last pushed, from a checkpoint; the next push makes it one more.
        `skips_frozen`: False where the engine forgets between pushes (`rollout.sglang.release_memory`).
        `adapters_only`: the engine adds the adapters to their matrices itself (`rollout.sglang.adapters_only`).
        """
        self._hf: nn.Module = policy.get_submodule("hf")
        self._engine = engine
        self._dtype = dtype
        self._is_first = True
        self._skips_frozen = skips_frozen
        self._merges = not adapters_only
        self._scale = scale_of(self._hf)
        self.policy_version = policy_version

    def push(self) -> PushReport:
        """Give the engine the current weights. A collective when sharded.

        An error of the engine is raised again after the remaining gathers, so that other ranks do not hang in them;
        the version then stays as it was, and the next push carries every weight.
        """
        start_s = time.perf_counter()
        base, factors = split_weights(self._hf)
        weights = self._changed(base, factors)
        num_bytes = 0

        def stream() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            for name, weight in weights.items():
                value = self._gather(merged(name, weight, factors, self._scale) if self._merges else weight)
                num_bytes += value.numel() * value.element_size()
                yield name, value

        remaining = stream()
        version = self.policy_version + 1
        self._is_first = True
        try:
            self._engine.load_weights(remaining, version)
        finally:
            for _ in remaining:  # an engine that stopped early would leave other ranks waiting in a gather
                pass
        self.policy_version = version
        self._is_first = False
        return PushReport(version, len(weights), num_bytes, time.perf_counter() - start_s)

    def _changed(self, base: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What this push carries, as it is in the learner: frozen matrices without their adapters."""
        if self._skips_frozen and not self._is_first:
            base = {
                name: weight
                for name, weight in base.items()
                if not _is_frozen(weight) or (self._merges and has_adapter(name, factors))
            }
        return base if self._merges else {**base, **factors}

    @torch.no_grad()
    def _gather(self, weight: Tensor) -> Tensor:
        shard = weight.detach()
        if self._dtype is not None and shard.is_floating_point():
            shard = shard.to(self._dtype)
        return whole_tensor(shard)


def _is_frozen(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and not weight.requires_grad  # buffers may change without a gradient
