"""The wire between trainer and worker: what is sent arrives, and what is no message does no harm."""

import socket
import struct
import subprocess
import threading

import pytest
import torch

from vcr1_fast.rollout.sgl.messages import SHARED_FROM_BYTES, Channel, Listener, SharedBytes, connect


@pytest.fixture
def ends():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channels = Channel(left), Channel(right)
    yield channels
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (300, 1176)])
def test_tensors_arrive_as_they_were(ends, dtype, shape):
    """Below 64 KiB they travel in the message, above it in shared memory; both must give the same."""
    sent = (torch.randn(shape) * 50).to(dtype)
    fields = {"id": 3, "text": "grün", "list": [1, 2.5, None]}
    ends[0].send("kind", fields, {"a": sent, "b": sent[:1]}, timeout_s=5)
    got = ends[1].receive(5)
    assert (got.kind, got.fields) == ("kind", fields)
    assert got.tensors["a"].dtype == dtype and torch.equal(got.tensors["a"], sent)
    assert torch.equal(got.tensors["b"], sent[:1])


def test_many_messages_keep_their_order_and_their_memory(ends):
    def send() -> None:
        for number in range(20):
            ends[0].send("n", {"id": number}, {"x": torch.full((40_000,), float(number))}, timeout_s=20)

    sender = threading.Thread(target=send)
    sender.start()
    messages = [ends[1].receive(20) for _ in range(20)]
    sender.join()
    assert [m.fields["id"] for m in messages] == list(range(20))
    assert all(bool((m.tensors["x"] == m.fields["id"]).all()) for m in messages)


def test_shared_memory_is_one_memory(ends):
    memory = SharedBytes(SHARED_FROM_BYTES)
    ends[0].send("weights", {}, {"bytes_B": memory}, timeout_s=5)
    view = ends[1].receive(5).tensors["bytes_B"]
    memory.bytes_B.fill_(7)
    assert bool((view == 7).all())  # nothing was copied
    memory.close()
    memory.close()
    assert bool((view == 7).all())  # the mapping outlives the descriptor


def test_a_connection_that_was_handed_over_ends_with_the_process_that_has_it(ends):
    """Open in a program that it starts, it would not close when it is killed."""
    near, far = socket.socketpair()
    ends[0].hand_over(near, 5)
    near.close()
    taken = ends[1].take_over(5)
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        taken.close()
        far.settimeout(5)
        assert far.recv(1) == b""
    finally:
        child.kill()
        child.wait()
        far.close()


def test_silence_and_the_end_are_told_apart(ends):
    with pytest.raises(TimeoutError):
        ends[1].receive(0.05)
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive(5)


def test_cut_in_the_middle_is_the_end(ends):
    ends[0]._socket.sendall(struct.pack("<4sIII", b"vcr1", 100, 0, 0) + b"{")
    ends[0].close()
    with pytest.raises(EOFError, match="in the middle"):
        ends[1].receive(5)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<4sIII", b"vcr1", 2**31, 0, 0),
        struct.pack("<4sIII", b"vcr1", 2, 0, 1) + b"{}",
        struct.pack("<4sIII", b"vcr1", 4, 0, 0) + b"nope",
    ],
)
def test_what_is_no_message_is_an_error(ends, raw):
    ends[0]._socket.sendall(raw)
    with pytest.raises(ValueError):
        ends[1].receive(5)


@pytest.mark.parametrize("entry", [{"dtype": "Tensor", "shape": [1]}, {"dtype": "int8", "shape": [9]}])
def test_a_tensor_that_does_not_fit_its_message_is_an_error(ends, entry):
    import json

    header = json.dumps({"kind": "k", "fields": {}, "tensors": [{"name": "x", "is_shared": False, **entry}]}).encode()
    ends[0]._socket.sendall(struct.pack("<4sIII", b"vcr1", len(header), 1, 0) + header + b"0")
    with pytest.raises(ValueError):
        ends[1].receive(5)


def test_only_who_knows_the_key_is_let_in(tmp_path):
    listener = Listener(tmp_path)
    outcome: list[object] = []

    def knock(key: bytes) -> None:
        try:
            outcome.append(connect(listener.address, key))
        except (OSError, EOFError) as error:
            outcome.append(error)

    for key, is_welcome in ((b"x" * 32, False), (listener.key, True)):
        thread = threading.Thread(target=knock, args=(key,))
        thread.start()
        channel = listener.accept(5)
        thread.join()
        assert (channel is not None) == is_welcome
        assert isinstance(outcome.pop(), Channel) == is_welcome
    assert listener.accept(0.05) is None
    listener.close()
    assert list(tmp_path.iterdir()) == []
