"""One process or many: process groups, FSDP2 sharding of the policy, and the few collectives the trainer needs.

In: torchrun's environment and a policy with float32 weights. Out: a `World`, and the same policy with each block's
weights split over the ranks (dimension 0). Called by the training loop, the checkpoint code and the weight sync.
Every function is a no-op on one process, so the loop has no second form.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import dropwhile, pairwise
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vcr1_fast.learner.families import family_of
from vcr1_fast.settings.config import ConfigError

T = TypeVar("T")
Unit = list[nn.Module]  # whose weights FSDP gathers, and whose gradients it adds up, in one collective
TOWER_PARTS_TOGETHER = 4

# A rank waits in a collective for the slowest rollout of the step; torch's default of 10 minutes for NCCL would kill a
# run in which one rank draws long completions.
COLLECTIVE_TIMEOUT_S = 3600.0

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the run. Example: `World()` is a run of one process on the CPU."""

    rank: int = 0  # 0 .. world_size - 1
    world_size: int = 1
    local_rank: int = 0  # rank on this machine, the index of its GPU
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


SINGLE_PROCESS = World()


def init_distributed(device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Read torchrun's environment and join the process group; without torchrun (or with one process) make no group.

    auto is CUDA when torch sees a GPU. CPU tensors always go over gloo, CUDA tensors over NCCL.
    Raises ConfigError when CUDA is asked for and absent, when the environment is incomplete, or when there are more
    ranks than GPUs on this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch sees no GPU: set model.device=auto, or check the driver")
    use_cuda = torch.cuda.is_available() and device != "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    if world_size > 1:
        missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start the run with torchrun"
            )
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank is {local_rank}, but this machine has {torch.cuda.device_count()} GPUs: "
            "set torchrun --nproc-per-node to at most that number"
        )
    torch_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(torch_device)
    if world_size == 1:
        return World(device=torch_device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if use_cuda else "gloo",
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=torch_device if use_cuda else None,
    )
    return World(dist.get_rank(), world_size, local_rank, torch_device)


def device_mesh(world: World, replicate: int = 1) -> DeviceMesh:
    """All ranks in a row; or `replicate` rows of them, each of which has all weights (hybrid sharding, HSDP).

    torchrun numbers the ranks of a node one after the other, so a row is a node, or several, or a part of one.
    """
    if replicate == 1:
        return init_device_mesh(world.device.type, (world.world_size,))
    shape = (replicate, world.world_size // replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(policy: nn.Module, world: World, compute_dtype: torch.dtype, mesh: DeviceMesh | None = None) -> None:
    """Split the policy's weights over the ranks, in place: FSDP2 on each of `sharded_units` and on the rest.

    Trained weights must be float32 and stay so; blocks compute in `compute_dtype`, gradients are reduced in float32.
    Gradients are SUMMED over ranks, not averaged: the token weights of a step are already normalised over all ranks
    (`PackedBatch.weight_N`), so a mean would divide the learning signal by the number of ranks.
    Everything that reads weights must run inside `policy.forward`, whose hooks gather them.
    mesh: `device_mesh`; None: of all ranks in a row. Raises TypeError for a trained weight that is not float32.
    """
    if world.world_size == 1:
        return
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TypeError(f"{name} is {parameter.dtype}, wanted float32 masters: load the model with dtype=float32")
    # Inputs are not cast: the vision tower's rotary tables are float32 on purpose, and bfloat16 ones have 8 bits of
    # position. Hidden states already arrive in compute_dtype, from weights of that type.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh or device_mesh(world), "mp_policy": precision}
    tower, decoder = sharded_units(policy.get_submodule("hf"))
    for unit in (*tower, *decoder):
        fully_shard(unit if len(unit) > 1 else unit[0], **options)
    fully_shard(policy, **options)
    _set_prefetch(tower, decoder)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the default scaled sum does not exist in gloo


def sharded_units(hf: Any) -> tuple[list[Unit], list[Unit]]:
    """What is gathered together, (of the tower, of the decoder and its two ends), in the order in which they run.

    Tower blocks go four at a time: one is 40 MB in bfloat16, too little to fill a link, where a decoder layer of 7B is
    470 MB. Embedding and head are apart, so that neither is whole for the whole step; tied, they are one weight.
    """
    family = family_of(hf.config)
    parts, layers = family.tower_parts(hf), list(hf.get_submodule(family.layers_name).children())
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    starts = range(0, max(TOWER_PARTS_TOGETHER, len(parts) - len(parts) % TOWER_PARTS_TOGETHER), TOWER_PARTS_TOGETHER)
    tower = [parts[start : None if start == starts[-1] else start + TOWER_PARTS_TOGETHER] for start in starts]
    if embedding.weight is head.weight:
        return tower, [[embedding, head], *([layer] for layer in layers)]
    return tower, [[embedding], *([layer] for layer in layers), [head]]


def _set_prefetch(tower: Sequence[Unit], decoder: Sequence[Unit]) -> None:
    """While one unit runs, the next is gathered, and no more than that one.

    Set by hand, because torch's own order of backward is that of forward, reversed: behind the first decoder layer it
    would gather the embedding, which no backward needs, and leave the tower's last blocks to be waited for. In forward
    the gathers are the same, and asked for before a unit's kernels are launched, not after: a host that is late is not
    late with them. A frozen tower mostly does not run at all, so nothing ahead of it gathers it.
    """
    forward: list[Any] = [unit[0] for unit in (*tower, *decoder)]
    for unit, following in pairwise(forward):
        unit.set_modules_to_forward_prefetch([following])
    embedding = decoder[0]
    if len(embedding) == 1:
        forward[len(tower)].set_unshard_in_backward(False)
    trained = dropwhile(_is_frozen, (*tower, *decoder))  # before the first trained weight nothing has a gradient
    backward: list[Any] = [unit[0] for unit in trained if embedding[0] not in unit]
    for before, unit in pairwise(backward):
        unit.set_modules_to_backward_prefetch([before])


def _is_frozen(unit: Unit) -> bool:
    return not any(weight.requires_grad for part in unit for weight in part.parameters())


def reduce_gradients(policy: nn.Module, at_once: bool, is_last: bool) -> None:
    """How the backward that comes next, of one row of an update, adds its gradients up over ranks.

    at_once: after the last row alone, one reduce-scatter a unit instead of one a row and unit, at the price of whole
    float32 gradients, 4 bytes x trained weights, until then. Else after each row, but between the rows of the mesh,
    which is between nodes, after the last one alone: it costs a shard's gradients until then, which are kept anyway.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(is_last or not at_once)
        policy.set_requires_all_reduce(is_last)


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their state-dict names, each tensor once (tied ones: first name).

    The values are the live tensors, DTensors under FSDP2; for parameters, the objects the optimizer holds. Unlike
    `named_parameters` this is right after a forward without backward too, when FSDP's root still has whole weights:
    the state-dict hooks reshard first.
    """
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def whole_tensor(tensor: Tensor) -> Tensor:
    """The full value, detached. A collective for a DTensor (all ranks must call it); a plain tensor is not copied."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


@overload
def all_reduce_sum(values: Tensor, world: World) -> Tensor: ...
@overload
def all_reduce_sum(values: Mapping[str, float], world: World) -> dict[str, float]: ...
def all_reduce_sum(values: Tensor | Mapping[str, float], world: World) -> Tensor | dict[str, float]:
    """Sum over ranks, of a tensor (same shape everywhere) or of named numbers (same names; summed in float64).

    The argument is left as it is. Raises ValueError when ranks bring different names.
    """
    if isinstance(values, Tensor):
        if world.world_size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total
    if world.world_size == 1:
        return dict(values)
    names = sorted(values)
    # The names' checksum must agree before numbers are added up by position.
    checksum = zlib.crc32("\0".join(names).encode())
    if all_max_int(checksum, world) != -all_max_int(-checksum, world):
        raise ValueError(f"ranks bring different names to all_reduce_sum; rank {world.rank} has {names}")
    total = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def all_max_int(value: int, world: World) -> int:
    """The largest value over ranks, for example the number of micro-batches every rank must run."""
    return int(_largest(torch.tensor(value, dtype=torch.int64), world))


def all_max_float(value: float, world: World) -> float:
    """The largest value over ranks, in float64."""
    return float(_largest(torch.tensor(value, dtype=torch.float64), world))


def _largest(value: Tensor, world: World) -> Tensor:
    if world.world_size > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def gather_all(value: T, world: World) -> list[T]:
    """The value of every rank, in the order of ranks: anything that can be pickled. A collective."""
    if world.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    # A reduction on the CPU, because dist.barrier under NCCL occupies the GPU and guesses its index.
    all_max_int(0, world)


def on_all_ranks(what: str, action: Callable[[], object], world: World) -> None:
    """Run `action` here and agree on the outcome: if it raises on one rank, every rank raises and none waits for it.

    `action` must hold no collective. The failing rank raises its own error, others OSError naming `what` and a rank.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    failed_rank = all_max_int(-1 if error is None else world.rank, world)
    if error is not None:
        raise error
    if failed_rank >= 0:
        raise OSError(f"rank {failed_rank} failed while {what}; its own message says why")


def on_main_rank(what: str, action: Callable[[], object], world: World) -> None:
    """Run `action` on rank 0 only, with the outcome agreed on as in `on_all_ranks`."""
    on_all_ranks(what, action if world.is_main else lambda: None, world)


def shutdown(world: World) -> None:
    """Leave the process group. Call it on every rank at the end, also after an error that all ranks raise."""
    if world.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def exit_rank(code: int) -> NoReturn:
    """End this process at once, after flushing what it printed. The last call of a rank, after `shutdown`.

    A normal exit of a process that had sharded a model over gloo aborts now and then in torch's destructors
    ("terminate called without an active exception": 3 times in two loops of at most 40 launches, torch 2.13), and
    torchrun then reports a finished run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
