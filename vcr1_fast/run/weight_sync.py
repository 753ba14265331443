"""Learner weights -> rollout engine, under checkpoint names, with a new version number.

Called by the training loop after each round of updates, and once before the first rollout.

Protocol. All ranks call `push` at the same point. In the order of the state dict, weights are gathered in buckets (one
collective for each, two where adapters are added; the same order on every rank; see learner/gathering.py) and handed to
this rank's engine one at a time through a lazy iterator, so that beside the shards and what the engine keeps
(rollout/sgl/delivery.py) there is at most one bucket and one whole tensor, 2.5 GB together.
The first push carries every weight; later ones leave out what is frozen, so an engine keeps what a push does not name.
With LoRA a matrix that has an adapter travels as the sum of both.
Tied weights travel once, under the name that `save_pretrained` keeps. An engine must copy what it gets before it asks
for the next tensor: its memory is used again, or is the learner's own. The version counts pushes: 1 after the first.

With `world` ranks agree on the outcome, and those of one machine keep one copy of the weights for lost workers between
them (rollout/sgl/host_copy.py). What each keeps is told twice: when the engine asks for the first weight, by when no
rank reads the last push's any more, and after the push went well on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vcr1_fast.learner.gathering import BUCKET_BYTES, whole_weights
from vcr1_fast.learner.lora import has_adapter, merged_parts, scale_of, split_weights
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, gather_all, on_all_ranks
from vcr1_fast.rollout.engine import RolloutEngine
from vcr1_fast.rollout.sgl.host_copy import HostCopy


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
        bucket_bytes: int = BUCKET_BYTES,
        world: World = SINGLE_PROCESS,
        host_copy: HostCopy | None = None,
    ) -> None:
        """`dtype`: the engine's, which floating weights are cast to before they are gathered; None: as stored, sums of
        adapters in float32.
        `policy_version`: of the weights last pushed, from a checkpoint; the next push makes it one more.
        `skips_frozen`: False where the engine forgets between pushes (`rollout.sglang.release_memory`).
        `bucket_bytes`: of weights that are gathered together, see learner/gathering.py.
        `world`: of the ranks that push together; `host_copy`: this engine's, if it has one.
        """
        self._hf: nn.Module = policy.get_submodule("hf")
        self._engine = engine
        self._dtype = dtype
        self._is_first = True
        self._skips_frozen = skips_frozen
        self._scale = scale_of(self._hf)
        self._bucket_bytes = bucket_bytes
        self._world, self._copy = world, host_copy if world.world_size > 1 else None
        self.policy_version = policy_version

    def push(self) -> PushReport:
        """Give the engine the current weights. A collective when sharded, or with a `world` of several ranks.

        An error of the engine is raised again after the remaining gathers, so that other ranks do not hang in them, and
        OSError on the others; the version then stays as it was, and the next push carries every weight.
        """
        start_s = time.perf_counter()
        base, factors = split_weights(self._hf)
        weights = self._changed(base, factors)
        parts = merged_parts(weights, factors, self._scale, self._dtype)
        num_bytes = 0

        def stream() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            if self._copy:
                self._copy.begin(gather_all(self._copy.told(), self._world), self._world.rank)
            for name, value in whole_weights(parts, self._bucket_bytes):
                num_bytes += value.numel() * value.element_size()
                yield name, value

        remaining = stream()
        version = self.policy_version + 1
        self._is_first = True

        def load() -> None:
            try:
                self._engine.load_weights(remaining, version)
            finally:
                for _ in remaining:  # an engine that stopped early would leave other ranks waiting in a gather
                    pass

        on_all_ranks("bringing new weights to the rollout engine", load, self._world)
        if self._copy:
            self._copy.end(gather_all(self._copy.told(), self._world))
        self.policy_version = version
        self._is_first = False
        return PushReport(version, len(weights), num_bytes, time.perf_counter() - start_s)

    def _changed(self, base: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What this push carries, as it is in the learner: frozen matrices without their adapters."""
        if self._skips_frozen and not self._is_first:
            base = {
                name: weight for name, weight in base.items() if not _is_frozen(weight) or has_adapter(name, factors)
            }
        return base


def _is_frozen(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and not weight.requires_grad  # buffers may change without a gradient
