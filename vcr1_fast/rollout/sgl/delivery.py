"""How weights travel from the learner to the workers of its engine: a class for each value of `rollout.sglang.weights`.

    shared_memory  into host memory that the worker opens; the same machine
    cuda_ipc       into buckets on the GPU whose handles the worker opens; the same GPU
    broadcast      buckets by NCCL, on a CPU by gloo; other GPUs, other machines

In: checked weights, whole tensors one at a time. Workers answer for each bucket, and a bucket is not written again
before all have. After a worker's first load it compares checksums (check.py).

A worker that is started again gets its weights from host memory (`Host`), never from the learner: gathering shards is a
collective, and the other ranks do not know of this worker. For that cuda_ipc and broadcast keep a copy of the weights
in host memory, too; `rollout.sglang.keep_host_copy` false saves it, and the loss of a worker then ends the run. The
copy is made from the buckets that are sent, so shards are gathered once.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from vcr1_fast.rollout.addresses import Address, read_addresses
from vcr1_fast.rollout.sgl import ipc
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.group import UpdateGroup
from vcr1_fast.rollout.sgl.libraries import Libraries, check_nccl
from vcr1_fast.rollout.sgl.weights import Batch, Weights, WeightStore, in_batches
from vcr1_fast.settings.error import require
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import RunError

if TYPE_CHECKING:
    from vcr1_fast.rollout.sgl.workers import Seat


class Delivery(Protocol):
    """`Host`, `CudaIpc` and `Broadcast`."""

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        """Bring changed weights, or all of them, to all seats of the feed, which notes the lost ones."""
        ...

    def refeed(self, feed: Feed) -> None:
        """Bring every weight to a worker that was started again. Raises RuntimeError where nobody has them."""
        ...

    def close(self) -> None: ...


class Host:
    """Copies in host memory, which workers open. The only way that needs neither a GPU nor a file system."""

    def __init__(self, bucket_bytes: int, dtype: torch.dtype) -> None:
        self.store = WeightStore(bucket_bytes, dtype)

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        changed = self.store.update(weights)
        self._send(changed if all(seat.is_checked for seat in seats) else self.store.all(), feed)

    def refeed(self, feed: Feed) -> None:
        self._send(self.store.all(), feed)

    def close(self) -> None:
        self.store.close()

    def _send(self, batches: list[Batch], feed: Feed) -> None:
        for index, batch in enumerate(batches):
            entries = batch.entries(feed.wants_checksums)
            feed.begin("bytes", entries, is_last=index == len(batches) - 1, tensors={"bytes_B": batch.memory})
            feed.finish()


class _Streamed:
    """Two buckets on the learner's device, in turn; `Host` beside it as the copy for workers that are started again."""

    def __init__(self, bucket_bytes: int, dtype: torch.dtype, copy: Host | None) -> None:
        self._bucket_bytes, self._dtype, self._copy = bucket_bytes, dtype, copy

    def refeed(self, feed: Feed) -> None:
        if self._copy is None:
            raise RunError(
                "a worker was lost and there is no copy of the weights to start another one with "
                "(rollout.sglang.keep_host_copy is false): set it to true, and resume the run from its last checkpoint"
            )
        self._copy.refeed(feed)

    def _batches(self, weights: Weights) -> Iterator[tuple[Batch, bool]]:
        """Each is kept when the next one is asked for: the workers load it meanwhile. It has the dtype that is sent: a
        copy from a GPU that also changes the dtype moves float32, and one core changes it."""
        for batch, is_last in in_batches(weights, self._bucket_bytes, self._dtype):
            yield batch, is_last
            if self._copy:
                self._copy.store.update(batch.weights())

    def close(self) -> None:
        if self._copy:
            self._copy.close()


class CudaIpc(_Streamed):
    """Handles of buckets on the GPU that learner and worker share. Untested: it needs a GPU."""

    def __init__(
        self,
        bucket_bytes: int,
        dtype: torch.dtype,
        copy: Host | None,
        share: Callable[[Tensor], Mapping[str, Any]],
        release: Callable[[], None],
    ) -> None:
        """`share`: handle of a bucket as JSON, new for each worker; `release`: after the last bucket (ipc)."""
        super().__init__(bucket_bytes, dtype, copy)
        self._share, self._release = share, release

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        for batch, is_last in self._batches(weights):
            feed.finish()  # of the bucket before: it may now be written again
            entries, flat_B = batch.entries(feed.wants_checksums), batch.flat_B
            handles = {index: {"handle": self._share(flat_B)} for index in feed.live}
            feed.begin("cuda_ipc", entries, is_last=is_last, details_of=handles.__getitem__)
        feed.finish()
        self._release()


class Broadcast(_Streamed):
    """One broadcast for each bucket over a group of this rank and its workers, made again after a worker was."""

    def __init__(
        self, bucket_bytes: int, dtype: torch.dtype, copy: Host | None, device: torch.device, address: str, name: str
    ) -> None:
        """`address`: of this machine, as the workers reach it; `name`: of the group, another one on each rank."""
        super().__init__(bucket_bytes, dtype, copy)
        self._device, self._address, self._name = device, address, name
        self._group: UpdateGroup | None = None
        self._num_groups = 0

    def push(self, weights: Weights, feed: Feed, seats: Sequence[Seat]) -> None:
        group = self._group_of(seats, feed)
        sent: dist.Work | None = None
        for batch, is_last in self._batches(weights):
            self._settle(feed, sent)
            entries = batch.entries(feed.wants_checksums)
            feed.begin("broadcast", entries, is_last=is_last, details_of=lambda _: {"group": group.name})
            sent = group.broadcast(batch.flat_B) if feed.live else None
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
                check_nccl(Libraries.here(), seat.worker.libraries, seat.worker.name)
        previous = self._group.name if self._group else ""
        self._leave()
        self._num_groups += 1
        sizes = [seat.worker.limits["num_gpus"] for seat in seats]
        group = UpdateGroup(f"{self._name}-{self._num_groups}", sum(sizes), self._device, self._address, feed.timeout_s)

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
        way != "cuda_ipc" or ipc.has_handles(),
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


def make_delivery(config: SGLangConfig, dtype: torch.dtype, device: torch.device) -> Delivery:
    """The class that `config` asks for. `dtype`: that floating weights are sent in; `device`: of the learner.

    Raises ConfigError for a way that cannot work here."""
    way, bucket_bytes = way_of(config, device), config.bucket_mb << 20
    if way == "shared_memory":
        return Host(bucket_bytes, dtype)
    copy = Host(bucket_bytes, dtype) if config.keep_host_copy else None
    if way == "cuda_ipc":
        return CudaIpc(bucket_bytes, dtype, copy, ipc.share, ipc.release)
    address = config.weights_address or own_address(read_addresses(config.addresses))
    return Broadcast(bucket_bytes, dtype, copy, device, address, f"vcr1-{secrets.token_hex(4)}")


def own_address(workers: Sequence[Address]) -> str:
    """Of this machine, as the first worker reaches it; without workers elsewhere the loopback address."""
    if not workers:
        return "127.0.0.1"
    family, kind, _, _, target = socket.getaddrinfo(*workers[0], type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing: the kernel chooses the address it would send from
        return str(probe.getsockname()[0])
