"""The worker's side of new weights and of memory that is lent to the learner; for worker.py.

Runs in SGLang's interpreter: only the standard library, torch and SGLang. A load is a row of "weights" messages, one a
bucket: the first opens SGLang's update session where it has one, the last ends it and sets the version.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import random
import socket
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.storage import TypedStorage

from vcr1_fast.rollout.sgl.messages import Message

CHECK_LOADER = "vcr1_fast.rollout.sgl.check.compare"
FORGET_LOADER = "vcr1_fast.rollout.sgl.check.forget_videos"
NO_WEIGHTS = -1
IDLE_WAIT_S = 30.0
_claims: list[socket.socket] = []  # of ports, open until this process ends


class Updater:
    """Weights and memory of one engine. Its methods answer one message each and raise what goes wrong."""

    def __init__(self, manager: Any, num_shares: int) -> None:
        """`manager`: the engine's tokenizer manager; `num_shares`: processes that the model is shared among."""
        self._num_shares = num_shares
        self.policy_version = NO_WEIGHTS
        self._manager = manager
        self._is_open = False
        self._released: set[str] = set()

    async def load(self, message: Message) -> dict[str, Any]:
        """One bucket. Gives what the comparison found wrong, if `check` asks for one."""
        fields = message.fields
        self.policy_version = NO_WEIGHTS  # until the last bucket is in
        is_last, version = bool(fields["is_last"]), str(fields["policy_version"])
        update = {"flush_cache": is_last, "weight_version": version if is_last else None}
        if fields["is_first"] and self._is_open:  # of a load that broke off
            await self._session(is_open=False)
        await self._session(is_open=True)
        is_broadcast = fields["source"] == "broadcast"
        await (self._from_broadcast if is_broadcast else self._from_bucket)(message, update)
        # A model in several processes is not read back: which share of what each has is SGLang's own affair. There the
        # answer that learner and engine compare before the first step (rollout/parity.py) shows a wrong weight alone.
        wrong = await self._compare(fields) if fields["check"] and self._num_shares == 1 else []
        if is_last:
            await self._from_tensors([("nothing", torch.zeros(1))], FORGET_LOADER, {"flush_cache": False})
            await self._session(is_open=False)
            self.policy_version = int(fields["policy_version"])
        return {"wrong": wrong}

    async def join(self, message: Message) -> dict[str, Any]:
        """Leave the group that weights came by, if any, and join another one."""
        fields = message.fields
        if fields["leaves"]:
            request = _request("DestroyWeightsUpdateGroupReqInput", group_name=fields["leaves"])
            await self._manager.destroy_weights_update_group(request, None)  # a broken one may not be there any more
        request = _request(
            "InitWeightsUpdateGroupReqInput",
            master_address=fields["address"],
            master_port=int(fields["port"]),
            rank_offset=int(fields["rank"]),
            world_size=int(fields["size"]),
            group_name=fields["name"],
            backend=fields["backend"],
        )
        _require(await self._manager.init_weights_update_group(request, None))
        return {}

    async def memory(self, message: Message) -> dict[str, Any]:
        """Give the memory named by tags ("weights", "kv_cache", "cuda_graph") back to the GPU, or take it again.

        Weights are undefined afterwards. SGLang must be idle, and fails for what is released or resumed twice.
        """
        tags, is_release = set(message.fields["tags"]), message.fields["action"] == "release"
        tags = tags - self._released if is_release else tags & self._released
        if not tags:
            return {}
        if is_release:
            await self._become_idle()
            self.policy_version = NO_WEIGHTS if "weights" in tags else self.policy_version
        verb = "release" if is_release else "resume"
        request = _request(f"{verb.title()}MemoryOccupationReqInput", tags=sorted(tags))
        await getattr(self._manager, f"{verb}_memory_occupation")(request, None)
        self._released ^= tags
        return {}

    async def _become_idle(self) -> None:
        """Until requests that were given up are gone: SGLang's process would end on a release before that."""
        deadline = time.monotonic() + IDLE_WAIT_S
        while not (await self._manager.flush_cache()).success:
            if time.monotonic() > deadline:
                raise RuntimeError(f"SGLang has requests for {IDLE_WAIT_S:g} s after the last one was answered")
            await asyncio.sleep(0.05)

    async def _from_bucket(self, message: Message, update: Mapping[str, Any]) -> None:
        """Bytes that came with the message, or a handle of a bucket on the GPU; SGLang's own process opens either."""
        is_handle = message.fields["source"] == "cuda_ipc"
        flat_B = CudaHandle(message.fields["handle"]) if is_handle else message.tensors["bytes_B"]
        bucket = {"flattened_tensor": flat_B, "metadata": [_metadata(entry) for entry in message.fields["entries"]]}
        await self._from_tensors(bucket, "flattened_bucket", update)

    async def _from_tensors(self, payload: object, load_format: str, update: Mapping[str, Any]) -> None:
        from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore[reportMissingImports]

        request = _request(
            "UpdateWeightsFromTensorReqInput",
            # one for each process: what is serialized may be opened once
            serialized_named_tensors=[MultiprocessingSerializer.serialize(payload) for _ in range(self._num_shares)],
            load_format=load_format,
            **update,
        )
        _require(await self._manager.update_weights_from_tensor(request, None))

    async def _from_broadcast(self, message: Message, update: Mapping[str, Any]) -> None:
        entries = message.fields["entries"]
        request = _request(
            "UpdateWeightsFromDistributedReqInput",
            names=[entry["name"] for entry in entries],
            dtypes=[entry["dtype"] for entry in entries],
            shapes=[list(entry["shape"]) for entry in entries],
            group_name=message.fields["group"],
            load_format="flattened_bucket",
            **update,
        )
        _require(await self._manager.update_weights_from_distributed(request, None))

    async def _compare(self, fields: Mapping[str, Any]) -> list[str]:
        """Has check.compare read the bucket's weights back inside SGLang's process; its order goes as a tensor."""
        with tempfile.NamedTemporaryFile() as report:
            order = {name: fields[name] for name in ("entries", "is_first", "is_last")} | {"file": report.name}
            named = [("order", torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8))]
            await self._from_tensors(named, CHECK_LOADER, {"flush_cache": False})
            return json.load(report)

    async def _session(self, *, is_open: bool) -> None:
        """Open or close SGLang's update session. Versions before 0.5.18 take weights without one."""
        was_open, self._is_open = self._is_open, False
        verb = "begin" if is_open else "end"
        if is_open != was_open and hasattr(self._manager, f"{verb}_weight_update"):
            request = _request(f"{verb.title()}WeightUpdateReqInput")
            _require(await getattr(self._manager, f"{verb}_weight_update")(request, None))
        self._is_open = is_open


class CudaHandle:
    """A tensor on a GPU of another process, from what CudaIpc.share gave; pickled, it is the tensor.

    Nothing is opened here: the process that unpickles it does. SGLang's own reductions take the GPU's UUID in the place
    of its index, because the two processes may count GPUs differently.
    """

    def __init__(self, handle: Mapping[str, Any]) -> None:
        handles = (base64.b64decode(each) if isinstance(each, str) else each for each in handle["handles"])
        size, place = torch.Size([handle["num_bytes"]]), (TypedStorage, torch.uint8, handle["device_uuid"])
        # of torch.multiprocessing.reductions.rebuild_cuda_tensor
        self.arguments = (Tensor, size, (1,), handle["tensor_offset"], *place, *handles)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        from sglang.srt.utils.patch_torch import (  # pyright: ignore[reportMissingImports]
            _rebuild_cuda_tensor_modified,
        )

        return _rebuild_cuda_tensor_modified, self.arguments


def engine_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with a port of our choice, and where memory is released no CUDA graphs of prefills, with which that
    clashes; not all versions of SGLang have them."""
    arguments = {"nccl_port": quiet_port(), **given}
    if arguments.get("enable_memory_saver"):
        from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

        if "cuda_graph_backend_prefill" in inspect.signature(ServerArgs).parameters:
            arguments.setdefault("cuda_graph_backend_prefill", "disabled")
    return arguments


def quiet_port() -> int:
    """A port for SGLang, the only one that it binds, which nobody takes in the 15 s until it does: no outgoing
    connection (Linux gives them 32768 and up), no worker of `vcr1-fast serve` (29800 and up), and no other engine's
    process, as this one has the Unix socket of that name until it ends."""
    while True:
        port = random.SystemRandom().randrange(20000, 29800)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            claim.bind(f"\0vcr1-port-{port}")
            _claims.append(claim)
            return port
        claim.close()


def _request(name: str, **values: object) -> Any:
    from sglang.srt.managers import io_struct  # pyright: ignore[reportMissingImports]

    return getattr(io_struct, name)(**values)


def _require(outcome: tuple[Any, ...]) -> None:
    """Raises RuntimeError unless SGLang says that it did what was asked: (success, message, ...)."""
    if not outcome[0]:
        raise RuntimeError(str(outcome[1]))


def _metadata(entry: Mapping[str, Any]) -> object:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata  # pyright: ignore[reportMissingImports]

    start, stop = int(entry["start"]), int(entry["stop"])
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return FlattenedTensorMetadata(entry["name"], torch.Size(entry["shape"]), dtype, start, stop, stop - start)
