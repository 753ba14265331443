"""How weights travel from the learner to the workers of its engine: a class for each value of `rollout.sglang.weights`.

    shared_memory  Delivery    host memory that the worker opens; the same machine, to others as bytes by TCP
    cuda_ipc       CudaIpc     buckets on the GPU whose handles the worker opens; the same GPU
    broadcast      Broadcast   buckets by NCCL, on a CPU by gloo; other GPUs, other machines

In: checked weights, whole tensors one at a time. They are laid into two buckets in turn; workers answer for each, and
none is written again before all have. After a worker's first load it compares checksums (check.py).

A worker that is started again gets its weights from a copy in host memory (host_copy.py), never from the learner:
gathering shards is a collective, and the other ranks do not know of this worker. The copy is made from the buckets that
are sent. `rollout.sglang.keep_host_copy` false saves it, and the loss of a worker then ends the run.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing import reductions

from vcr1_fast.rollout.addresses import Address, read_addresses
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.group import Libraries, UpdateGroup
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.messages import SharedBytes
from vcr1_fast.rollout.sgl.weights import Bucket, Weights, in_buckets
from vcr1_fast.settings.error import require
from vcr1_fast.settings.learning import SGLangConfig

if TYPE_CHECKING:
    from vcr1_fast.rollout.sgl.workers import Seat

# Memory of expandable segments has no handle of the kind that SGLang's process opens.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class Delivery:
    """Through host memory. The only way that needs neither a GPU nor a file system."""

    in_host_memory = True  # where its buckets are, else on the learner's device

    def __init__(self, bucket_bytes: int, dtype: torch.dtype, copy: HostCopy) -> None:
        """`dtype`: that floating weights are sent in."""
        self.copy = copy
        self._bucket_bytes, self._dtype = bucket_bytes, dtype
        self._shared: list[SharedBytes] = []  # its two buckets

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        """Bring changed weights, or all of them, to all seats of the feed, which notes the lost ones."""
        for bucket, is_last in self._buckets(weights):
            feed.finish()  # the one before, which may now be written again
            self._begin(bucket, feed, is_last=is_last)
        feed.finish()

    def refeed(self, feed: Feed) -> None:
        """Bring every weight to a worker that was started again. Raises RunError as `HostCopy.all`."""
        buckets = self.copy.all()
        for index, bucket in enumerate(buckets):
            Delivery._begin(self, bucket, feed, is_last=index == len(buckets) - 1)
            feed.finish()

    def close(self) -> None:
        self.copy.close()

    def _buckets(self, weights: Weights) -> Iterator[tuple[Bucket, bool]]:
        """Each is kept when the next one is asked for: the workers load it meanwhile."""
        shared = self._shared if self.in_host_memory else None
        for bucket, is_last in in_buckets(weights, self._bucket_bytes, self._dtype, shared):
            yield bucket, is_last
            self.copy.keep(bucket)
        self.copy.finish()

    def _begin(self, bucket: Bucket, feed: Feed, *, is_last: bool) -> None:
        entries = bucket.entries(feed.wants_checksums)
        feed.begin("bytes", entries, is_last=is_last, tensors={"bytes_B": bucket.memory})


class CudaIpc(Delivery):
    """Handles of buckets on the GPU that learner and worker share, opened there without a copy. Untested: it needs a
    GPU. Messages carry them as JSON, and SGLang's own process opens them (update.py). torch counts for each whether the
    other process has let go of it; until then the memory is not given back."""

    in_host_memory = False

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        super().push(weights, feed, seats)
        self.release()

    def _begin(self, bucket: Bucket, feed: Feed, *, is_last: bool) -> None:
        handles = {index: {"handle": self.share(bucket.filled)} for index in feed.live}
        entries = bucket.entries(feed.wants_checksums)
        feed.begin("cuda_ipc", entries, is_last=is_last, details_of=handles.__getitem__)

    def share(self, flat_B: Tensor) -> dict[str, Any]:
        """A handle of these bytes, for one process to open once; what was queued to write them is waited for.

        The device is named by its UUID: two processes may count GPUs differently.
        """
        torch.cuda.current_stream(flat_B.device).synchronize()
        arguments: Any = reductions.reduce_tensor(flat_B)[1]
        return {
            "num_bytes": flat_B.numel(),
            "tensor_offset": arguments[3],
            "device_uuid": str(torch.cuda.get_device_properties(flat_B.device).uuid),
            # of storage, counter and event, in torch's order; texts stand for bytes
            "handles": [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in arguments[7:]],
        }

    def release(self) -> None:
        """Give buckets that nobody has open any more back to the GPU, where SGLang may need the memory."""
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


class Broadcast(Delivery):
    """One broadcast for each bucket over a group of this rank and its workers, made again after a worker was."""

    in_host_memory = False

    def __init__(
        self, bucket_bytes: int, dtype: torch.dtype, copy: HostCopy, device: torch.device, address: str
    ) -> None:
        """`address`: of this machine, as the workers reach it."""
        super().__init__(bucket_bytes, dtype, copy)
        self._device, self._address = device, address
        self._group: UpdateGroup | None = None

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        group = self._group_of(seats, feed)
        sent: dist.Work | None = None
        for bucket, is_last in self._buckets(weights):
            self._settle(feed, sent)
            entries = bucket.entries(feed.wants_checksums)
            feed.begin("broadcast", entries, is_last=is_last, details_of=lambda _: {"group": group.name})
            sent = group.broadcast(bucket.filled) if feed.live else None
        self._settle(feed, sent)

    def close(self) -> None:
        self._leave()
        super().close()

    def _settle(self, feed: Feed, sent: dist.Work | None) -> None:
        """The bucket is with everybody. Without one of its members a group is of no use, and the others may hang in it:
        all are lost then, and the rest of the weights goes to the host copy alone."""
        feed.finish_together()
        if not feed.live:
            self._leave()
        elif sent is not None:
            try:
                sent.wait()
            except RuntimeError as error:
                feed.give_up(f"lost the broadcast of weights: {error}")
                self._leave()

    def _leave(self) -> None:
        if self._group:
            self._group.close()
            self._group = None

    def _group_of(self, seats: Sequence[Seat], feed: Feed) -> UpdateGroup:
        if self._group and all(seat.group == self._group.name for seat in seats):
            return self._group
        if self._device.type == "cuda":
            for seat in seats:
                Libraries.here().require_nccl_of(seat.worker.libraries, seat.worker.name)
        previous = self._group.name if self._group else ""
        self._leave()
        sizes = [seat.worker.limits["num_gpus"] for seat in seats]
        group = UpdateGroup(sum(sizes), self._device, self._address, feed.timeout_s)

        def fields_of(index: int) -> dict[str, Any]:
            return {
                **{"name": group.name, "address": group.address, "port": group.port, "backend": group.backend},
                **{"rank": 1 + sum(sizes[:index]), "size": group.size},
                "leaves": previous if seats[index].group == previous else "",
            }

        feed.ask("group", fields_of)
        joining = group.begin_join()
        feed.finish_together(lambda: joining.done() and joining.exception() is not None)
        if feed.live:
            joining.result()
            self._group = group
        for index in feed.live:
            seats[index].group = group.name
        return group


def way_of(config: SGLangConfig, device: torch.device) -> str:
    """What `rollout.sglang.weights` auto stands for; any other value is given back. `device`: of the learner.

    Raises ConfigError for cuda_ipc and broadcast where they cannot work.
    """
    is_gpu, is_shared = device.type == "cuda", config.placement == "colocated"
    way = config.weights
    if way == "auto":
        way = "shared_memory" if not is_gpu else "cuda_ipc" if is_shared else "broadcast"
    require(way != "cuda_ipc" or is_gpu, f"rollout.sglang.weights is {way}, wanted auto: the learner is on a CPU")
    require(
        way != "cuda_ipc" or has_handles(),
        "weights go to a worker on the same GPU by cuda_ipc, but PYTORCH_CUDA_ALLOC_CONF asks for expandable_segments, "
        "whose memory no other process can open: take them out, or set rollout.sglang.weights to shared_memory, which "
        "copies every push through host memory",
    )
    require(
        not (way == "broadcast" and is_gpu and is_shared),
        "rollout.sglang.weights is broadcast and rollout.sglang.placement is colocated, but NCCL takes no two "
        "processes on one GPU: set rollout.sglang.weights to auto",
    )
    return way


def has_handles() -> bool:
    """Whether this process's GPU memory can be opened by another one."""
    return not any("expandable_segments:true" in os.environ.get(name, "").lower() for name in _ALLOCATOR_VARIABLES)


def make_delivery(config: SGLangConfig, dtype: torch.dtype, device: torch.device) -> Delivery:
    """The class that `config` asks for. `dtype`: that floating weights are sent in; `device`: of the learner.

    Raises ConfigError for a way that cannot work here."""
    way, copy = way_of(config, device), HostCopy(is_kept=config.keep_host_copy)
    parts = (config.bucket_mb << 20, dtype, copy)
    if way == "broadcast":
        address = config.weights_address or own_address(read_addresses(config.addresses))
        return Broadcast(*parts, device, address)
    return (CudaIpc if way == "cuda_ipc" else Delivery)(*parts)


def own_address(workers: Sequence[Address]) -> str:
    """Of this machine, as the first worker reaches it; without workers elsewhere the loopback address."""
    if not workers:
        return "127.0.0.1"
    family, kind, _, _, target = socket.getaddrinfo(*workers[0], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing: the kernel chooses the address it would send from
        return str(probe.getsockname()[0])
