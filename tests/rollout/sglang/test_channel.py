"""The wire between trainer and worker: what is sent arrives, is read by nobody, and what is no message does no harm."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time

import pytest
import torch

from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.sgl import channel as sglang_channel
from vcr1_fast.rollout.sgl import messages as sglang_messages
from vcr1_fast.rollout.sgl.channel import VERSION, Channel, KeyRefusedError, connect
from vcr1_fast.rollout.sgl.endpoint import Endpoint
from vcr1_fast.rollout.sgl.messages import SHARED_FROM_BYTES, SharedBytes, decode, encode

KEY = b"k" * 32


def free_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()


@pytest.fixture(params=["tcp", "ipc"])
def address(request, tmp_path) -> str:
    """A folder with a long name, longer than a Unix socket's address may be."""
    if request.param == "tcp":
        return f"tcp://{show(free_address())}"
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    return f"ipc://{folder / 'worker-0.sock'}"


@pytest.fixture
def endpoint(address):
    endpoint = Endpoint(address, KEY)
    yield endpoint
    endpoint.close()


@pytest.fixture
def channel(endpoint, address):
    channel = begun(address, endpoint)
    yield channel
    channel.close()


def begun(address: str, endpoint: Endpoint) -> Channel:
    channel = connect(address, KEY)
    channel.send("start", {"version": VERSION})
    assert endpoint.receive().kind == "start"
    assert channel.receive(5).kind == "starting"
    return channel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (300, 1176)])
@pytest.mark.parametrize("by_reference", [False, True])
def test_tensors_come_out_as_they_went_in(dtype, shape, by_reference, monkeypatch):
    """Whole or in pieces, in the message or in shared memory."""
    monkeypatch.setattr(sglang_messages, "MAX_FRAME_BYTES", 100_000)
    sent = (torch.randn(shape) * 50).to(dtype)
    fields = {"id": 3, "text": "grün", "list": [1, 2.5, None]}
    frames, lent = encode("kind", fields, {"a": sent, "b": sent[:1]}, by_reference=by_reference)
    assert len(lent) == int(by_reference and sent.nbytes >= SHARED_FROM_BYTES)
    got = decode(frames)
    assert (got.kind, got.fields) == ("kind", fields)
    assert got.tensors["a"].dtype == dtype and torch.equal(got.tensors["a"], sent)
    assert torch.equal(got.tensors["b"], sent[:1])


def test_many_messages_keep_their_order_and_their_memory(channel, endpoint, address):
    """3 MB each way and at once; what was lent is given back with the answer."""
    for number in range(20):
        channel.send("n", {"id": number}, {"x": torch.full((40_000,), float(number))})
        endpoint.send("m", {"id": number}, {"x": torch.full((40_000,), -float(number))})
    assert len(channel._lent) == 20 * address.startswith("ipc")
    for number in range(20):
        got, answer = endpoint.receive(), channel.receive(20)
        assert (got.fields["id"], answer.fields["id"]) == (number, number)
        assert bool((got.tensors["x"] == number).all()) and bool((answer.tensors["x"] == -number).all())
    assert not channel._lent


def test_shared_memory_is_one_memory():
    memory = SharedBytes(SHARED_FROM_BYTES)
    view = decode(encode("weights", {}, {"bytes_B": memory}, by_reference=True)[0]).tensors["bytes_B"]
    memory.bytes_B.fill_(7)
    assert bool((view == 7).all())  # nothing was copied
    frames, _ = encode("weights", {}, {"bytes_B": memory}, by_reference=True)
    memory.close()
    memory.close()
    assert bool((view == 7).all())  # the mapping outlives the descriptor
    with pytest.raises(ValueError, match="no message"):
        decode(frames)


def header(**tensor: object) -> list[bytes]:
    entry = {"name": "x", "dtype": "uint8", "shape": [1], **tensor}
    return [json.dumps({"kind": "k", "fields": {}, "tensors": [entry]}).encode(), b"0"]


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"[]"],
        [b"[" * 100_000],
        [b'{"kind": 7, "fields": {}, "tensors": []}'],
        [b'{"kind": "k", "fields": {}, "tensors": []}', b"0"],
        header()[:1],
        header(name=["x"]),
        header(dtype="Tensor"),
        header(dtype="no_grad"),
        header(shape=[9]),
        header(shape=[-1]),
        header(shape=[1 << 62, 1 << 62]),
        header(shape=[0, 2**70]),
        header(shape=[0, 2**39, 2**39]),
        header(file=[os.getpid(), 0, 0]),
        header(file=["../../etc", "passwd", 0]),
    ],
)
def test_what_is_no_message_is_an_error(frames):
    with pytest.raises(ValueError, match="no message"):
        decode([memoryview(frame) for frame in frames])


def test_silence_the_end_and_a_close_on_this_side_are_told_apart(channel, endpoint):
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    endpoint.send("last")
    endpoint.close()
    assert channel.receive(5).kind == "last"
    with pytest.raises(EOFError):
        channel.receive(5)
    assert channel.is_over
    with pytest.raises(ConnectionError):
        channel.send("k")


def test_a_close_ends_the_other_side(channel, endpoint):
    channel.close()
    with pytest.raises(EOFError):
        endpoint.receive()


def test_only_who_knows_the_key_is_let_in(address, endpoint, channel):
    with pytest.raises(KeyRefusedError, match="another key than we have"):
        connect(address, b"x" * 32)
    channel.send("still there")
    assert endpoint.receive().kind == "still there"


def test_one_who_left_before_he_was_heard_keeps_nobody_out(address, endpoint):
    for _ in range(20):
        hasty = connect(address, KEY)
        hasty.send("start", {"version": VERSION})
        hasty.close(linger_s=1.0)
    time.sleep(0.3)  # the worker has heard of their ends, and not what they said
    late = begun(address, endpoint)
    endpoint.send("ready")
    assert late.receive(5).kind == "ready"
    late.close()


class Wire:
    """Between trainer and worker: records what passes; told to, it changes the last byte, or passes nothing more."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.passed, self.is_changing, self.is_cut = b"", False, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://{show(self._listener.getsockname())}"
        self._target = target
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        near, far = self._listener.accept()[0], socket.create_connection(self._target)
        threading.Thread(target=self._pass, args=(far, near), daemon=True).start()
        self._pass(near, far)

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                self.passed += data
                if self.is_cut:
                    continue
                other.sendall(data[:-1] + bytes([data[-1] ^ self.is_changing]))
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_one_whose_machine_is_gone_is_found_out(monkeypatch):
    """Nothing comes any more, not even the end of the connection."""
    monkeypatch.setattr(sglang_channel, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(sglang_channel, "HEARTBEAT_LIMIT_S", 0.5)
    target = free_address()
    endpoint = Endpoint(f"tcp://{show(target)}", KEY)
    wire = Wire(target)
    channel = begun(wire.address, endpoint)
    time.sleep(1.0)
    assert not channel.is_over and not endpoint.is_over
    wire.is_cut = True
    with pytest.raises(EOFError):
        channel.receive(5)
    with pytest.raises(EOFError):
        endpoint.receive()
    channel.close()
    endpoint.close()


def test_nobody_between_reads_a_message_or_changes_one():
    target = free_address()
    endpoint = Endpoint(f"tcp://{show(target)}", KEY)
    wire = Wire(target)
    channel = begun(wire.address, endpoint)
    secret = torch.arange(200, dtype=torch.uint8)
    channel.send("generate", {"id": 1}, {"x": secret})
    assert torch.equal(endpoint.receive().tensors["x"], secret)
    assert len(wire.passed) > 500 and b"generate" not in wire.passed and bytes(secret.tolist()) not in wire.passed
    wire.is_changing = True
    channel.send("generate", {"id": 2}, {"x": secret})
    with pytest.raises(EOFError):
        endpoint.receive()
    with pytest.raises(EOFError):
        channel.receive(5)
    channel.close()
    endpoint.close()


def test_in_a_loop_messages_come_in_order_and_what_is_none_ends_the_worker(tmp_path):
    """As the real worker reads, while it sends as well: what ZeroMQ shows of a message goes away with the sending."""
    ended = threading.Event()
    endpoint = Endpoint(f"ipc://{tmp_path}/worker.sock", KEY, tmp_path / "status", when_over=ended.set)
    channel = begun(f"ipc://{tmp_path}/worker.sock", endpoint)
    loop, got = asyncio.new_event_loop(), []

    def take(message):
        got.append(message.fields["id"])
        endpoint.send("answer", {"id": message.fields["id"]})
        if len(got) == 200:
            loop.stop()

    def ask():
        for number in range(200):
            channel.send("ask", {"id": number})
            time.sleep(0.001 * (number % 3))

    endpoint.attach(loop, take)
    asker = threading.Thread(target=ask)
    asker.start()
    loop.call_later(20, loop.stop)
    loop.run_forever()
    asker.join()
    assert got == list(range(200))
    assert [channel.receive(5).fields["id"] for _ in range(200)] == got
    (tmp_path / "status").unlink()  # as `vcr1-fast serve` does when it ends
    endpoint._take = lambda message: (got.append(message.kind), loop.stop())
    loop.run_forever()
    assert got[-1] == "close" and not ended.is_set()
    channel._socket.send(b"no message at all")
    loop.call_later(0.5, loop.stop)
    loop.run_forever()
    assert ended.is_set() and endpoint.is_over
    loop.close()
    channel.close()
    endpoint.close()
