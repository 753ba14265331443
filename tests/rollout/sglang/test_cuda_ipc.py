"""Handles of GPU memory: what the other side calls, and on a GPU the way of whole buckets into another process."""

import inspect
import json
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from vcr1_fast.rollout.sgl.check import checksum
from vcr1_fast.rollout.sgl.delivery import CudaIpc, has_handles
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.update import CudaHandle
from vcr1_fast.rollout.sgl.workers import Seat
from vcr1_fast.rollout.weight_table import WeightTable


def test_a_handle_is_opened_with_torchs_own_arguments(monkeypatch):
    """In torch's order, which has no names: what `reduce_tensor` gives comes back, but for the device's UUID."""
    share = (3, b"storage", 4096, 512, b"counter", 7, b"event", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    given = dict.fromkeys(names) | {"tensor_offset": 16} | dict(zip(names[6:10], share[:4], strict=True))
    given |= {"requires_grad": False} | dict(zip(names[11:], share[4:], strict=True))
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (reductions.rebuild_cuda_tensor, tuple(given.values())))
    handle = CudaIpc(1, torch.float32, HostCopy()).share(torch.zeros(100, dtype=torch.uint8))
    assert json.loads(json.dumps(handle)) == handle  # as it travels
    bound = inspect.signature(reductions.rebuild_cuda_tensor).bind(*CudaHandle(handle).arguments).arguments
    wanted = given | {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([100]),
        "tensor_stride": (1,),
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": "GPU-1",
    }
    assert bound == wanted


def open_buckets(connection: Connection) -> None:
    """The other process: opens each handle, as SGLang's does, and says the checksums of what it finds."""
    torch.cuda.init()
    by_uuid = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    while (fields := connection.recv()) is not None:
        arguments = list(CudaHandle(fields["handle"]).arguments)
        arguments[6] = by_uuid[arguments[6]]
        flat_B = reductions.rebuild_cuda_tensor(*arguments)
        parts = [(flat_B[e["start"] : e["stop"]], getattr(torch, e["dtype"])) for e in fields["entries"]]
        connection.send([checksum(part_B.view(dtype)) for part_B, dtype in parts])
        del flat_B, parts


class OtherProcess:
    """A worker whose weights are checked in a process of its own."""

    name = "other"

    def __init__(self, connection: Connection) -> None:
        self.num_checked = 0
        self._asked: Mapping[str, Any] = {}
        self._connection = connection

    def send(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self._connection.send({"handle": fields["handle"], "entries": fields["entries"]})
        self._asked = fields

    def answer(self, timeout_s: float) -> Message:
        got, sent = self._connection.recv(), [entry["checksum"] for entry in self._asked["entries"]]
        self.num_checked += len(got)
        return Message("loaded", {"id": self._asked["id"], "wrong": [] if got == sent else ["other bytes"]})

    def kill(self) -> None: ...


@pytest.mark.gpu
@pytest.mark.skipif(not has_handles(), reason="expandable segments cannot be opened by another process")
def test_buckets_on_a_gpu_arrive_in_another_process():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=open_buckets, args=(theirs,), daemon=True)
    process.start()
    worker = OtherProcess(ours)
    delivery = CudaIpc(1 << 20, torch.bfloat16, HostCopy())
    table, before = WeightTable(), torch.cuda.memory_allocated()
    for version in range(1, 4):
        generator = torch.Generator("cuda").manual_seed(version)
        weights = {f"w{i}": torch.randn(300, 700, generator=generator, device="cuda") for i in range(12)}
        seats = [Seat(worker)]  # pyright: ignore[reportArgumentType]  # not checked yet: each push compares
        with Feed(seats, lambda: 0, version, 60.0) as feed:
            delivery.push(table.checked(weights.items()), feed, seats)
        assert not feed.lost
        kept = {slot.name: slot.of(bucket.filled) for bucket in delivery.copy.all() for slot in bucket.slots}
        assert all(torch.equal(kept[name], value.bfloat16().cpu()) for name, value in weights.items())
        del weights
    assert worker.num_checked == 36
    ours.send(None)
    process.join(60)
    assert process.exitcode == 0
    delivery.close()
    assert torch.cuda.memory_allocated() - before < 1 << 20  # the buckets are gone
