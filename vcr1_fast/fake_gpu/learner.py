"""A learner built and run on fake GPUs: one rank of a world, its loads and updates metered.

Only rank 0 runs. The fake process group gives every collective its shapes and lets nobody wait.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vcr1_fast.fake_gpu.checkpoint import write_checkpoint
from vcr1_fast.fake_gpu.costs import ATTENTION, GEMM, SHARDING
from vcr1_fast.fake_gpu.groups import GroupShape, make_group
from vcr1_fast.fake_gpu.meter import Meter
from vcr1_fast.fake_gpu.mode import FakeGpu
from vcr1_fast.learner import step, update_rows
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.families.family import ModelFamily
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.sharding import World
from vcr1_fast.settings.config import Config
from vcr1_fast.types import RolloutGroup

DEVICE = torch.device("cuda", 0)


@dataclass
class Measured:
    """What loading, or one update, cost on rank 0."""

    seconds_here: float  # on this CPU
    live_bytes: int  # afterwards
    peaks: dict[str, dict[str, int]]  # phase -> bytes by kind, when most were alive in it
    launches: int
    gemm_flop: int
    attention_flop: int
    moved_bytes: int  # by kernels that are neither, nor a copy of FSDP's
    predicted_s: float  # kernels one after the other
    collective_s: float
    kernels: dict[str, dict[str, dict[str, float]]]  # phase -> name -> vars(meter.Kernel)
    syncs: dict[str, int]
    blocking_copies: dict[str, int]
    copies: dict[str, int]
    collectives: list[tuple[str, int]]


def measured(meter: Meter, began_s: float) -> Measured:
    """The meter's counts since its last start."""
    kernels = [kernel for named in meter.kernels.values() for kernel in named.items()]
    others = [k for name, k in kernels if not name.startswith((GEMM, ATTENTION)) and name not in SHARDING]
    return Measured(
        seconds_here=round(time.perf_counter() - began_s, 2),
        live_bytes=meter.memory.now_bytes,
        peaks={phase: {k: n for k, n in peak.kinds.items() if n} for phase, peak in meter.memory.peaks.items()},
        launches=sum(kernel.launches for _, kernel in kernels),
        gemm_flop=round(sum(kernel.flop for name, kernel in kernels if name.startswith(GEMM))),
        attention_flop=round(sum(kernel.flop for name, kernel in kernels if name.startswith(ATTENTION))),
        moved_bytes=round(sum(kernel.num_bytes for kernel in others)),
        predicted_s=sum(kernel.seconds for _, kernel in kernels),
        collective_s=meter.collective_s,
        kernels={phase: {n: vars(k) for n, k in named.items()} for phase, named in meter.kernels.items()},
        syncs=dict(meter.syncs),
        blocking_copies=dict(meter.blocking_copies),
        copies=dict(meter.copies),
        collectives=list(meter.collectives),
    )


class FakeLearner:
    """A `Learner` on fake GPU 0 of `num_gpus`. Make it inside the mode: `with gpu: FakeLearner(...)`."""

    def __init__(
        self, gpu: FakeGpu, config: Config, hf_config: Any, num_gpus: int, kernels: KernelChoice | None = None
    ) -> None:
        self.gpu, self.config, self.hf_config, self.num_gpus = gpu, config, hf_config, num_gpus
        self.family = family_of(hf_config)
        if num_gpus > 1 and not dist.is_initialized():
            dist.init_process_group("fake", rank=0, world_size=num_gpus, store=FakeStore())
        began_s = time.perf_counter()
        gpu.meter.start()
        gpu.meter.enter("load", "load")
        with tempfile.TemporaryDirectory() as folder, _marking(gpu, self.family):
            write_checkpoint(Path(folder), hf_config)
            config = replace(config, model=replace(config.model, path=folder))
            undrawn = (hf_config.image_token_id, hf_config.video_token_id)
            self.learner = step.Learner(config, World(0, num_gpus, 0, DEVICE), 100, kernels, undrawn)
        for policy in (self.learner.policy, self.learner.reference):
            for parameter in policy.parameters() if policy else ():
                gpu.meter.memory.mark(_local(parameter), "weights")
        self.load = measured(gpu.meter, began_s)

    def groups(self, shapes: Sequence[GroupShape]) -> list[RolloutGroup]:
        """As a rollout would leave them, on the GPU."""
        self.gpu.meter.enter("clips", "clips")
        return [make_group(shape, self.family, self.hf_config, DEVICE) for shape in shapes]

    def update(self, groups: Sequence[RolloutGroup], teaches: bool = False, min_rows: int = 0) -> Measured:
        """One `update_grpo` (or `update_sft`) of these groups. `min_rows`: what other ranks have at least."""

        def on_all_ranks(largest: Any) -> Any:
            return lambda value, world: max(largest(value, world), min_rows)

        def of_all_ranks(_: Any) -> Any:  # each has such groups as this one, so none leaves its rank
            return lambda sizes, world: [list(sizes)] * world.world_size

        began_s = time.perf_counter()
        self.gpu.meter.start()
        others = (_replaced(step, "all_max_int", on_all_ranks), _replaced(update_rows, "gather_all", of_all_ranks))
        with _marking(self.gpu, self.family), others[0], others[1]:
            if teaches:
                self.learner.update_sft(groups)
            else:
                self.learner.update_grpo(groups)
        for state in self.learner.optimizer.state.values():
            for value in state.values():
                self.gpu.meter.memory.mark(_local(value), "moments")
        return measured(self.gpu.meter, began_s)


def _local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


@contextmanager
def _marking(gpu: FakeGpu, family: ModelFamily) -> Iterator[None]:
    """Tell the meter which part of an update runs."""
    meter = gpu.meter

    def during(phase: str, kind: str, afterwards: tuple[str, str]) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                meter.enter(phase, kind)
                result = function(*args, **kwargs)
                meter.enter(*afterwards)
                return result

            return wrapped

        return wrap

    def run_tower(function: Any) -> Any:
        forward = during("tower forward", "activations", ("decoder forward", "activations"))(function)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            features_MW = forward(*args, **kwargs)
            if features_MW.requires_grad:  # its gradient is what the decoder's backward ends with
                features_MW.register_hook(lambda _: meter.enter("tower backward", "backward"))
            return features_MW

        return wrapped

    def enter_in_backward(phase: str) -> Callable[[Any, Any, Tensor], None]:
        def watch(_module: Any, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: meter.enter(phase, "backward"))

        return watch

    def decode(function: Any) -> Any:
        forward = during("decoder forward", "activations", ("head", "head"))(function)

        def wrapped(family: Any, hf: Any, embeds_TD: Tensor, *args: Any) -> Any:
            # activations go as gradients come: most is alive at one of the two ends of the decoder's backward
            layers = family.decoder(hf).layers
            hook = layers[len(layers) // 2].register_forward_hook(enter_in_backward("decoder backward, second half"))
            enter_in_backward("embedding backward")(None, None, embeds_TD)  # the largest gradient, beside all layers'
            try:
                return forward(family, hf, embeds_TD, *args)
            finally:
                hook.remove()

        return wrapped

    with (
        _replaced(PolicyModel, "device_batch", during("batch", "batch", ("decoder forward", "activations"))),
        _replaced(PolicyModel, "__call__", during("decoder forward", "activations", ("decoder backward", "backward"))),
        _replaced(type(family), "run_tower", run_tower),
        _replaced(type(family), "decode", decode),
        _replaced(step, "clip_grad_norm", during("optimizer", "optimizer", ("optimizer", "moments"))),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
