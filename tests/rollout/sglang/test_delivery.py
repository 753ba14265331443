"""Each way that weights travel, with workers of this process that take them apart as SGLang does, and may die."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch
from torch import distributed as dist

from vcr1_fast.rollout.sgl import workers as sglang_workers
from vcr1_fast.rollout.sgl.check import checksum
from vcr1_fast.rollout.sgl.delivery import Broadcast, CudaIpc, Delivery, has_handles, make_delivery, own_address, way_of
from vcr1_fast.rollout.sgl.feed import Feed
from vcr1_fast.rollout.sgl.group import Libraries
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.link import WorkerGoneError
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.weights import Bucket
from vcr1_fast.rollout.sgl.workers import Seat, Workers
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.settings.error import ConfigError
from vcr1_fast.settings.learning import SGLangConfig

CPU, FLOAT = torch.device("cpu"), torch.float32
BUCKET_BYTES = 1000
FAR: dict[str, Any] = {"placement": "disaggregated", "addresses": ("127.0.0.1:29800",)}
SHAPES = {"visual.a": (10, 10), "visual.b": (30,), "model.c": (20, 20), "model.d": (7,), "model.e": (150,)}


def weights(seed: int, names: tuple[str, ...] = tuple(SHAPES)) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(SHAPES[name], generator=generator)) for name in names]


class Worker:
    """Takes what SGLang's worker takes, from any source. `dies_at`: the number of the message it dies at."""

    def __init__(self, shared: Mapping[int, torch.Tensor], dies_at: int = 0, corrupts: str = "") -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.log: list[str] = []
        self.sources: list[str] = []
        self.versions: list[int] = []
        self.is_killed = self.has_ended = False
        self.name, self.num_starts, self.limits = "fake", 0, {"num_gpus": 1}
        self._shared, self._dies_at, self._corrupts = shared, dies_at, corrupts
        self._num_messages = 0
        self._groups: dict[str, Any] = {}
        self._asked: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._answers: SimpleQueue[Message | Exception] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, *message: Any) -> None:
        self._asked.put(message)

    def answer(self, timeout_s: float) -> Message:
        try:
            answer = self._answers.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def gone(self, what: str) -> WorkerGoneError:
        self.kill()
        return WorkerGoneError(what)

    def _work(self) -> None:
        while True:
            try:
                self._answers.put(self._answer(*self._asked.get()))
            except (RuntimeError, WorkerGoneError) as error:  # the former of gloo
                self._answers.put(WorkerGoneError(str(error)))

    def _answer(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> Message:
        self._num_messages += 1
        self.log.append(" ".join([kind, fields.get("action", ""), *fields.get("tags", [])]).strip())
        if 0 < self._dies_at <= self._num_messages:
            for group in self._groups.values():
                group.abort()
            raise WorkerGoneError("was told to die")
        if kind == "group":
            return self._join(fields)
        if kind == "memory":
            return Message("loaded", {"id": fields["id"]})
        flat_B = getattr(self, "_" + fields["source"])(fields, tensors)
        wrong = []
        for entry in fields["entries"]:
            if flat_B is not None:
                part_B = flat_B[entry["start"] : entry["stop"]]
                self.held[entry["name"]] = part_B.clone().view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
            if entry["name"] == self._corrupts:
                self.held[entry["name"]] = self.held[entry["name"]] + 1
            if fields["check"] and checksum(self.held[entry["name"]]) != entry["checksum"]:
                wrong.append(f"{entry['name']!r} is wrong")
        self.sources.append(fields["source"])
        if fields["is_last"]:
            self.versions.append(fields["policy_version"])
        return Message("loaded", {"id": fields["id"], "wrong": wrong})

    def kill(self) -> None:
        self.is_killed = True

    def start(self) -> None:
        """After a death it is a fresh one."""
        self.held, self.log, self._dies_at = {}, [], 0 if self.num_starts else self._dies_at
        self.has_ended = False
        self.num_starts += 1

    def wait_ready(self, timeout_s: float) -> None: ...

    def stop(self) -> None: ...

    def _join(self, fields: Mapping[str, Any]) -> Message:
        """As torch's helper does for SGLang: these are its names of keys."""
        limit = timedelta(seconds=3)  # of one whose fellow does not come
        store: Any = dist.TCPStore(fields["address"], fields["port"], fields["size"], False, limit)  # pyright: ignore
        for prefix in (fields["name"], fields["name"] + "/", "cpu/"):
            store = dist.PrefixStore(prefix, store)  # pyright: ignore
        if fields["leaves"]:
            self._groups.pop(fields["leaves"]).abort()
        self._groups[fields["name"]] = dist.ProcessGroupGloo(store, fields["rank"], fields["size"], limit)
        return Message("loaded", {"id": fields["id"]})

    def _bytes(self, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        return tensors["bytes_B"].bytes_B

    def _cuda_ipc(self, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        time.sleep(0.02)  # the learner would have written over a bucket that it does not keep until the answer
        return self._shared[fields["handle"]["number"]]

    def _broadcast(self, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        flat_B = torch.empty(sum(e["stop"] - e["start"] for e in fields["entries"]), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._groups[fields["group"]].broadcast([flat_B], options).wait()
        return flat_B


class WithoutGpu(CudaIpc):
    """Its handles stand for buckets of this process."""

    def __init__(self, shared: dict[int, torch.Tensor], *parts: Any) -> None:
        super().__init__(*parts)
        self.shared, self.releases = shared, 0

    def share(self, flat_B: torch.Tensor) -> dict[str, Any]:
        number = len(self.shared)
        self.shared[number] = flat_B
        return {"number": number}

    def release(self) -> None:
        self.releases += 1


class Learner:
    """A delivery with its table and seats, as workers.py has them."""

    def __init__(self, way: str, *, copy: bool = True, dtype: torch.dtype = FLOAT) -> None:
        self.shared: dict[int, torch.Tensor] = {}
        self.copy = HostCopy(is_kept=copy)
        parts = (BUCKET_BYTES, dtype, self.copy)
        self.delivery = {
            "shared_memory": lambda: Delivery(*parts),
            "cuda_ipc": lambda: WithoutGpu(self.shared, *parts),
            "broadcast": lambda: Broadcast(*parts, CPU, "127.0.0.1"),
        }[way]()
        self.table, self.numbers = WeightTable(), count(1)
        self.seats: list[Seat] = []

    def worker(self, **how: Any) -> Worker:
        worker = Worker(self.shared, **how)
        self.seats.append(Seat(worker))  # pyright: ignore[reportArgumentType]
        return worker

    def feed(self, seats: list[Seat], version: int) -> Feed:
        return Feed(seats, lambda: next(self.numbers), version, 5.0)

    def push(self, given: list[tuple[str, torch.Tensor]], version: int) -> dict[int, str]:
        with self.feed(self.seats, version) as feed:
            self.delivery.push(self.table.checked(given), feed, self.seats)
        return feed.lost

    def replace(self, index: int, version: int) -> Worker:
        """A fresh worker in the place of a lost one."""
        worker = Worker(self.shared)
        self.seats[index] = Seat(worker)  # pyright: ignore[reportArgumentType]
        with self.feed([self.seats[index]], version) as feed:
            self.delivery.refeed(feed)
        assert not feed.lost
        return worker


def assert_holds(worker: Worker, *pushes: list[tuple[str, torch.Tensor]]) -> None:
    wanted = {name: value for given in pushes for name, value in given}
    assert set(worker.held) == set(wanted)
    assert all(torch.equal(worker.held[name], value) for name, value in wanted.items())


WAYS = ["shared_memory", "cuda_ipc", "broadcast"]
CHANGED = ("model.c", "model.e")


@pytest.fixture(params=WAYS)
def learner(request):
    learner = Learner(request.param)
    yield learner
    learner.delivery.close()


def test_two_workers_hold_every_push_and_a_fresh_one_catches_up(learner):
    workers = [learner.worker(), learner.worker()]
    first, second, third = weights(1), weights(2, CHANGED), weights(3, CHANGED)
    for version, given in enumerate((first, second, third), 1):
        assert learner.push(given, version) == {}
    for worker in workers:
        assert_holds(worker, first, second, third)
        assert worker.versions == [1, 2, 3]
    fresh = learner.replace(1, 3)
    assert_holds(fresh, first, third)
    fourth = weights(4)
    assert learner.push(fourth, 4) == {}
    assert_holds(fresh, fourth)
    assert_holds(workers[0], fourth)


def test_a_wrong_weight_is_found_at_the_first_load_alone(learner):
    worker = learner.worker(corrupts="model.d")
    with pytest.raises(RuntimeError, match=r"'model\.d' is wrong"):
        learner.push(weights(1), 1)
    assert worker.is_killed
    assert not learner.seats[0].is_checked


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_worker_that_dies_is_lost_and_its_successor_gets_the_same(learner, dies_at):
    healthy, _ = learner.worker(), learner.worker(dies_at=dies_at)
    given, lost = weights(1), {}
    version = 0
    while not lost:
        version += 1
        lost = learner.push(given, version)
    assert "was told to die" in lost[1]
    if isinstance(learner.delivery, Broadcast):  # it is of no use without one of its members
        assert "together with another" in lost[0]
        assert healthy.is_killed
    else:
        assert set(lost) == {1}
        assert_holds(healthy, given)
    for index in lost:
        assert_holds(learner.replace(index, version), given)
    later = weights(2, CHANGED)
    assert learner.push(later, version + 1) == {}
    assert all(torch.equal(seat.worker.held["model.c"], later[0][1]) for seat in learner.seats)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_host_copy_nothing_is_kept_and_a_loss_says_what_to_do(way):
    learner = Learner(way, copy=False)
    worker = learner.worker()
    learner.push(weights(1), 1)
    assert_holds(worker, weights(1))
    with pytest.raises(RuntimeError, match="keep_host_copy is false"):
        learner.replace(0, 1)
    learner.delivery.close()


def test_handles_are_new_for_each_worker_and_buckets_are_given_back():
    learner = Learner("cuda_ipc")
    for _ in range(2):
        learner.worker()
    learner.push(weights(1), 1)
    assert len(learner.shared) % 2 == 0 and len(learner.shared) >= 6
    assert len({flat_B.data_ptr() for flat_B in learner.shared.values()}) < len(learner.shared) / 2  # used again
    assert isinstance(learner.delivery, WithoutGpu) and learner.delivery.releases == 1


def test_a_load_that_breaks_off_leaves_nobody_reading(learner):
    worker, before = learner.worker(), set(threading.enumerate())
    with pytest.raises(ValueError, match="given twice"):
        learner.push([*weights(1), weights(1)[0]], 1)
    for thread in set(threading.enumerate()) - before:
        thread.join(10.0)
        assert not thread.is_alive(), thread
    learner.push(weights(2), 2)
    assert_holds(worker, weights(2))


def test_the_host_copy_is_made_of_what_is_sent(monkeypatch):
    """A copy of the float32 weights would move twice as much from a GPU, and leave the rounding to a core."""
    placed: list[torch.dtype] = []
    keep, bfloat16 = HostCopy.keep, torch.bfloat16

    def recorded(copy: HostCopy, bucket: Bucket) -> None:
        placed.extend(slot.dtype for slot in bucket.slots)
        keep(copy, bucket)

    monkeypatch.setattr(HostCopy, "keep", recorded)
    learner = Learner("cuda_ipc", dtype=bfloat16)
    learner.worker()
    assert learner.push(weights(1), 1) == {} and placed == [bfloat16] * len(SHAPES)
    assert_holds(learner.replace(0, 1), [(name, value.bfloat16()) for name, value in weights(1)])


def test_a_broadcast_needs_one_nccl(start, monkeypatch):
    """torch 2.11 and 2.14 bring two; the scripted worker says that it has the older one."""
    ours = Libraries("2.14.1+cu130", "13.0", "2.30.7")
    monkeypatch.setattr(Libraries, "here", lambda: ours)
    [seat] = start(["ok"], has_weights=False)._workers.seats
    theirs = Libraries("2.11.0+cu129", "12.9", "2.28.9")
    assert seat.worker.libraries == theirs
    learner = Broadcast(BUCKET_BYTES, FLOAT, HostCopy(), torch.device("cuda", 0), "127.0.0.1")
    feed = Feed([seat], count().__next__, 1, 5.0)
    said = r"worker-0 has NCCL 2\.28\.9 \(torch 2\.11\.0\+cu129\) .* 2\.30\.7 .*`pip install torch==2\.11\.0`"
    with pytest.raises(ConfigError, match=said):
        learner.push(weights(1), feed, [seat])
    ours.require_nccl_of(replace(theirs, nccl="2.30.7"), "w")
    assert ours.pip_line(replace(ours, nccl="2.29.7")) == "pip install nvidia-nccl-cu13==2.29.7"


def test_the_way_follows_the_placement(monkeypatch):
    gpu = torch.device("cuda", 0)
    far = SGLangConfig(**FAR)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert way_of(SGLangConfig(), CPU) == way_of(far, CPU) == "shared_memory"
    assert way_of(SGLangConfig(), gpu) == "cuda_ipc"
    assert way_of(far, gpu) == "broadcast"
    with pytest.raises(ConfigError, match="learner is on a CPU"):
        way_of(SGLangConfig(weights="cuda_ipc"), CPU)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert not has_handles()
    for asked in ("auto", "cuda_ipc"):
        with pytest.raises(ConfigError, match=r"expandable_segments.*shared_memory"):
            way_of(SGLangConfig(weights=asked), gpu)
    assert way_of(far, gpu) == "broadcast"
    with pytest.raises(ConfigError, match="no two processes on one GPU"):
        way_of(SGLangConfig(weights="broadcast"), gpu)
    for way, kind in (("shared_memory", Delivery), ("broadcast", Broadcast)):
        config = replace(SGLangConfig(), weights=way)
        assert type(make_delivery(config, FLOAT, CPU)) is kind
    assert own_address([]) == own_address([("127.0.0.1", 29800)]) == "127.0.0.1"


@pytest.fixture
def start_workers(monkeypatch, tmp_path):
    def start(**how: Any) -> tuple[Workers, Worker]:
        worker = Worker({}, **how)
        monkeypatch.setattr(sglang_workers, "make_workers", lambda *_: [worker])
        return Workers(SGLangConfig(backoff_s=0), {"device": "cpu"}, tmp_path, FLOAT), worker

    return start


def test_a_worker_that_died_between_two_loads_costs_no_other(monkeypatch, tmp_path):
    pair = [Worker({}), Worker({})]
    monkeypatch.setattr(sglang_workers, "make_workers", lambda *_: pair)
    workers = Workers(SGLangConfig(backoff_s=0, weights="broadcast"), {"device": "cpu"}, tmp_path, FLOAT)
    first, second = weights(1), weights(2, CHANGED)
    workers.load(first, 1)
    for group in pair[1]._groups.values():
        group.abort()
    pair[1].has_ended = True
    workers.load(second, 2)
    assert [worker.num_starts for worker in pair] == [1, 2]
    assert workers.num_restarts == 1
    for worker in pair:
        assert_holds(worker, first, second)
    assert len({seat.group for seat in workers.seats}) == 1 and workers.seats[0].group
    workers.close()


def test_memory_is_resumed_around_a_whole_load(start_workers):
    """Weights before they are written, the KV cache only when the load needs no room any more."""
    workers, worker = start_workers()
    workers.load(weights(1), 1)
    assert worker.log == ["weights"]
    for version in (2, 3):
        worker.log.clear()
        workers.release_memory()
        assert workers.is_released
        assert not workers.has_weights
        workers.load(weights(version), version)
        assert worker.log == [
            "memory release weights kv_cache cuda_graph",
            "memory resume weights",
            "weights",
            "memory resume cuda_graph kv_cache",
        ]
        assert not workers.is_released
        assert_holds(worker, weights(version))


def test_a_load_after_a_release_must_be_whole(start_workers):
    workers, worker = start_workers()
    workers.load(weights(1), 1)
    workers.release_memory()
    with pytest.raises(ValueError, match="3 weights are missing"):
        workers.load(weights(2, CHANGED), 2)
    assert (workers.is_released, workers.policy_version) == (True, 1)
    workers.load(weights(3), 3)
    assert_holds(worker, weights(3))


def test_a_worker_that_dies_at_a_release_is_started_again_by_the_load(start_workers):
    workers, worker = start_workers(dies_at=2)
    workers.load(weights(1), 1)
    workers.release_memory()
    workers.load(weights(2), 2)
    assert workers.num_restarts == 1
    assert worker.log == ["weights"]  # a fresh one has nothing to resume
    assert_holds(worker, weights(2))
