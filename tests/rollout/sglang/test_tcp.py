"""The wire between machines: what is sent arrives, and what somebody put in, changed or cut off is refused."""

import socket
import struct
import threading
import time

import pytest
import torch

from vcr1_fast.rollout.sgl import handshake as sglang_handshake
from vcr1_fast.rollout.sgl import messages as sglang_messages
from vcr1_fast.rollout.sgl import tcp as sglang_tcp
from vcr1_fast.rollout.sgl.handshake import GREETING, SessionKeys
from vcr1_fast.rollout.sgl.messages import SharedBytes
from vcr1_fast.rollout.sgl.tcp import TcpChannel, TcpListener, connect_tcp, greeted

KEY = b"k" * 32
LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def listener():
    listener = TcpListener(LOOPBACK)
    yield listener
    listener.close()


@pytest.fixture
def ends(listener):
    """The trainer's end and the worker's."""
    made: list[TcpChannel] = []
    thread = threading.Thread(target=lambda: made.append(connect_tcp(listener.address, KEY, 5)))
    thread.start()
    accepted = greet_next(listener)
    thread.join()
    yield made[0], accepted
    made[0].close()
    accepted.close()


def greet_next(listener: TcpListener) -> TcpChannel:
    found = listener.accept(5)
    assert found is not None and found[1][0] == "127.0.0.1"
    return greeted(found[0], KEY)


def in_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (300, 1176)])
def test_tensors_arrive_as_they_were(ends, dtype, shape):
    sent = (torch.randn(shape) * 50).to(dtype)
    fields = {"id": 3, "text": "grün", "list": [1, 2.5, None]}
    thread = in_thread(lambda: ends[0].send("kind", fields, {"a": sent, "b": sent[:1]}, timeout_s=5))
    got = ends[1].receive(5)
    thread.join()
    assert (got.kind, got.fields) == ("kind", fields)
    assert got.tensors["a"].dtype == dtype and torch.equal(got.tensors["a"], sent)
    assert torch.equal(got.tensors["b"], sent[:1])


def test_a_bucket_of_weights_arrives_both_ways_at_once(ends):
    """3 MB each way: more than the buffers hold, several pieces, and both sides send and receive."""
    memory = SharedBytes(3_000_001)
    memory.bytes_B.copy_(torch.randint(0, 256, (3_000_001,), dtype=torch.uint8))
    threads = [in_thread(lambda end=end: end.send("weights", {}, {"bytes_B": memory}, timeout_s=20)) for end in ends]
    for end in ends:
        assert torch.equal(end.receive(20).tensors["bytes_B"], memory.bytes_B)
    for thread in threads:
        thread.join()


def test_a_channel_goes_on_in_the_process_it_was_handed_to(ends):
    ends[0].send("first", timeout_s=5)
    assert ends[1].receive(5).kind == "first"
    adopted = TcpChannel.restored(ends[1].connection.dup(), ends[1].state())
    ends[1].release()
    ends[0].send("second", timeout_s=5)
    assert adopted.receive(5).kind == "second"
    adopted.send("third", timeout_s=5)
    assert ends[0].receive(5).kind == "third"
    adopted.close()
    with pytest.raises(EOFError):
        ends[0].receive(5)


class Recorded:
    """Sockets of one channel's frames: what `send` wrote."""

    def __init__(self, keys: SessionKeys, listener: TcpListener) -> None:
        self.near = socket.create_connection(listener.address)
        self.far, _ = listener._socket.accept()
        self.channel = TcpChannel(self.near, keys)

    def frame(self, *message, **tensors) -> bytes:
        self.channel.send(*message, tensors=tensors, timeout_s=5)
        self.far.settimeout(0.2)
        data = b""
        try:
            while part := self.far.recv(1 << 20):
                data += part
        except TimeoutError:
            return data
        return data


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def test_what_is_not_signed_by_the_other_side_is_refused(listener):
    """A flipped bit anywhere, a frame twice, out of order, sent back, or under another key."""
    keys = SessionKeys(b"a" * 32, b"b" * 32)
    recorded = Recorded(keys, listener)
    first = recorded.frame("one", {"id": 1}, x=torch.arange(100))
    second = recorded.frame("two", {"id": 2})
    other = Recorded(SessionKeys(b"c" * 32, b"b" * 32), listener).frame("one", {"id": 1}, x=torch.arange(100))
    size = struct.calcsize("<4sIQ")

    def outcome(frames: bytes, num_good: int) -> None:
        near, far = socket.create_connection(listener.address), listener._socket.accept()[0]
        channel = TcpChannel(far, SessionKeys(b"b" * 32, b"a" * 32))
        near.sendall(frames)
        for _ in range(num_good):
            channel.receive(5)
        with pytest.raises(ValueError, match=r"not signed|wanted a message"):
            channel.receive(5)
        near.close()
        channel.close()

    for index in (0, size, size + 9, len(first) - 900, len(first) - 33, len(first) - 1):
        outcome(flipped(first, index), 0)
    outcome(first + first, 1)
    outcome(second, 0)
    outcome(other, 0)
    outcome(Recorded(SessionKeys(b"b" * 32, b"a" * 32), listener).frame("one"), 0)  # what this side sent, sent back
    near, far = socket.create_connection(listener.address), listener._socket.accept()[0]
    channel = TcpChannel(far, SessionKeys(b"b" * 32, b"a" * 32))
    near.sendall(first + second)
    assert [channel.receive(5).kind for _ in range(2)] == ["one", "two"]
    near.close()
    channel.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<4sIQ", b"vcrT", 2**31, 0),
        struct.pack("<4sIQ", b"vcrT", 2, 2**60) + b"{}" + b"0" * 32,
        struct.pack("<4sIQ", b"vcrT", 2, 0) + b"{}" + b"0" * 32,
    ],
)
def test_what_is_no_message_is_an_error(ends, raw):
    ends[0].connection.sendall(raw)
    with pytest.raises(ValueError):
        ends[1].receive(5)


def test_sizes_that_a_receiver_would_refuse_are_not_sent(ends, monkeypatch):
    monkeypatch.setattr(sglang_tcp, "MAX_TENSOR_BYTES", 99)
    with pytest.raises(ValueError, match="100 bytes of tensors, wanted <= 99"):
        ends[0].send("k", {}, {"x": torch.zeros(100, dtype=torch.uint8)}, timeout_s=5)
    monkeypatch.setattr(sglang_messages, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="wanted <= 1000"):
        ends[0].send("k", {"text": "x" * 1000}, timeout_s=5)


def test_a_stop_in_mid_frame_ends_even_a_wait_without_limit(ends, monkeypatch):
    monkeypatch.setattr(sglang_messages, "STALL_S", 0.2)
    ends[0].connection.sendall(struct.pack("<4sIQ", b"vcrT", 1000, 0) + b"{")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ends[1].receive()
    assert time.monotonic() - began < 5


def test_silence_an_end_in_mid_frame_and_a_full_pipe_are_told_apart(ends):
    with pytest.raises(TimeoutError):
        ends[1].receive(0.05)
    with pytest.raises(TimeoutError):  # nobody reads 64 MB
        ends[0].send("big", {}, {"x": torch.zeros(64 << 20, dtype=torch.uint8)}, timeout_s=0.3)
    ends[0].close()
    with pytest.raises(EOFError, match="in the middle"):
        ends[1].receive(5)


def test_close_wakes_a_thread_that_waits(ends):
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ends[0].receive()
        except (EOFError, OSError) as error:
            errors.append(error)

    thread = in_thread(wait)
    time.sleep(0.1)
    ends[0].close()
    thread.join(5)
    assert not thread.is_alive() and len(errors) == 1


def test_only_who_knows_the_key_is_let_in(listener):
    refused: list[BaseException] = []

    def knock() -> None:
        try:
            connect_tcp(listener.address, b"x" * 32, 5)
        except PermissionError as error:
            refused.append(error)

    thread = in_thread(knock)
    with pytest.raises(PermissionError, match="turned away"):
        greet_next(listener)
    thread.join()
    assert "another key" in str(refused[0])
    assert listener.accept(0.05) is None


def test_a_listener_without_the_key_is_not_trusted(listener):
    """It makes up its proof; no message was sent to it."""

    def pretend() -> None:
        connection, _ = listener._socket.accept()
        connection.sendall(GREETING + b"n" * 32)
        connection.recv(64)
        connection.sendall(b"p" * 32)

    thread = in_thread(pretend)
    with pytest.raises(PermissionError, match="does not know the key"):
        connect_tcp(listener.address, KEY, 5)
    thread.join()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"vcr1-fast 9\n" + b"n" * 32])
def test_another_program_or_version_is_named(listener, greeting):
    thread = in_thread(lambda: listener._socket.accept()[0].sendall(greeting))
    with pytest.raises(ValueError, match="another program, or another version"):
        connect_tcp(listener.address, KEY, 5)
    thread.join()


@pytest.mark.parametrize("how", ["silent", "slow"])
def test_a_stranger_holds_nobody_up(listener, monkeypatch, how):
    """One that sends a byte every 0.1 s would need 6.4 s for the handshake; the limit is for all of it."""
    monkeypatch.setattr(sglang_tcp, "HANDSHAKE_S", 0.5)
    stranger = socket.create_connection(listener.address)
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.1):
            stranger.sendall(b"x")

    thread = in_thread(drip) if how == "slow" else None
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        greet_next(listener)
    assert time.monotonic() - began < 3
    is_over.set()
    if thread:
        thread.join()
    stranger.close()


def test_session_keys_are_new_each_time_and_one_for_each_direction():
    def keys() -> tuple[SessionKeys, SessionKeys]:
        left, right = socket.socketpair()
        found: list[SessionKeys] = []
        thread = in_thread(lambda: found.append(sglang_handshake.introduce(left, KEY, 5)))
        mine = sglang_handshake.greet(right, KEY, 5)
        thread.join()
        left.close()
        right.close()
        return mine, found[0]

    (a, b), (c, _) = keys(), keys()
    assert (a.send, a.receive) == (b.receive, b.send)
    assert len({a.send, a.receive, c.send, c.receive}) == 4
