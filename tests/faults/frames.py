"""Hostile connections to the port of `vcr1-fast serve`; after each an honest trainer is served at once.

A real Server with a worker that speaks the messages without SGLang. Each trial has a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.faults.runs import forked
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import Runs
from vcr1_fast.rollout.sgl.channel import VERSION, Channel, connect

KEY = b"k" * 32
SOON_S = 5.0  # an honest trainer waits no longer than this for its first answer; undisturbed 0.3 s
HEADERS: tuple[object, ...] = (
    *([], {}, 7, None, "start", {"kind": 7}, {"kind": "start"}, {"kind": "start", "fields": []}),
    *({"kind": "start", "fields": {}, "tensors": 3}, {"kind": "start", "fields": None, "tensors": []}),
    {"kind": "start", "fields": {"version": []}, "tensors": []},
    {"kind": "start", "fields": {"version": "0.0.0\x1b[31m\n"}, "tensors": []},
    {"kind": "generate", "fields": {}, "tensors": []},
    *(
        {"kind": "start", "fields": {"version": VERSION}, "tensors": [entry]}
        for entry in (
            *({}, None, 7, "x", {"name": "a"}, {"name": 3, "dtype": "float32", "shape": [1]}),
            {"name": "a", "dtype": "float32", "shape": [-1]},
            {"name": "a", "dtype": "float32", "shape": [1 << 62, 1 << 62]},
            {"name": "a", "dtype": "float32", "shape": ["1"]},
            {"name": "a", "dtype": "float32", "shape": None},
            {"name": "a", "dtype": "nn", "shape": [1]},
            {"name": "a", "dtype": "float32", "shape": [1e300]},
            {"name": "a", "dtype": [], "shape": [1]},
            {"name": "a", "dtype": "uint8", "shape": [1], "file": [1, 0, 0]},
        )
    ),
)
# Of ZMTP 3.1 (rfc.zeromq.org/spec/37): signature, version, mechanism, as a client
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)


def be_hostile(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder, name = bench.empty_folder(), rng.choice(list(ATTACKS))
    bench.fault = f"{name} at serve's port"
    seed = rng.randrange(1 << 30)
    detail, took = folder / "detail", folder / "took"

    def attack_and_use() -> None:
        with _Serve(folder) as server:
            address = server.stations[0].address
            held = ATTACKS[name](random.Random(seed), address, detail)
            began = time.monotonic()
            _use(server, folder)
            took.write_text(str(time.monotonic() - began))
            server.check()
            for connection in held:
                connection.close()

    ended = forked(attack_and_use, folder / "log")
    bench.fault += f" ({detail.read_text()[:100]})" if detail.exists() else ""
    ended.checked()
    if ended.code != 0:
        raise LostError(f"serve or its trainer failed: {ended.err[-300:]}")
    if float(took.read_text()) > SOON_S:
        raise LostError(f"an honest trainer waited {float(took.read_text()):.1f} s")


class _Serve:
    def __init__(self, folder: Path) -> None:
        from tests.rollout.sglang.forked_worker import Forked
        from vcr1_fast.rollout.serve import Server
        from vcr1_fast.rollout.sgl import process
        from vcr1_fast.settings.learning import SGLangConfig

        os.environ.update(SCRIPTED_WORKER_FOLDER=str(folder), VCR1_ROLLOUT_KEY=KEY.hex())
        process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # type: ignore[attr-defined]
        (folder / "plan.json").write_text('["ok"]')
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.mkdir()
        (self.checkpoint / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
        settings = SGLangConfig(backoff_s=0.01, start_timeout_s=30.0)
        self._server = Server(
            settings, self.checkpoint, bind=("127.0.0.1", 0), gpus=[None], key=KEY, logs=folder / "logs"
        )

    def __enter__(self):
        self._server.start(30)
        return self._server

    def __exit__(self, *_: object) -> None:
        self._server.close()


def _use(server, folder: Path) -> None:
    """An honest trainer: weights, then answers to a prompt."""
    from tests.conftest import build_tokenizer, make_example
    from vcr1_fast.prompts.positions import mrope_positions
    from vcr1_fast.rollout.addresses import show
    from vcr1_fast.rollout.sglang_engine import SGLangEngine
    from vcr1_fast.settings.learning import SGLangConfig
    from vcr1_fast.types import Patches, Prompt, SamplingParams

    tokenizer = build_tokenizer()
    pad = tokenizer.get_vocab()["<|video_pad|>"]
    ids = torch.tensor(tokenizer("a<|vision_start|><|video_pad|><|vision_end|>?")["input_ids"])
    patches = Patches(torch.zeros(4, 1176), (1, 2, 2), 1.0, 2, 1.0)
    prompt = Prompt(make_example(), ids, mrope_positions(ids, [(1, 2, 2)], [1.0], pad, 2), (patches,))
    addresses = tuple(show(station.address) for station in server.stations)
    settings = SGLangConfig(
        placement="disaggregated", addresses=addresses, backoff_s=0.01, timeout_s=30.0, start_timeout_s=60.0
    )
    engine = SGLangEngine(folder / "checkpoint", tokenizer, settings)
    try:
        engine.load_weights([("model.language_model.w", torch.ones(3)), ("model.visual.w", torch.ones(300, 300))], 1)
        answers = engine.generate([prompt], SamplingParams(3, 4))
        assert int(answers[0][0].token_ids_R[0]) == int(ids[0]), "another answer than that to its prompt"
    finally:
        engine.close()


Address = tuple[str, int]
Held = list[socket.socket | Channel]
Attack = Callable[[random.Random, Address, Path], Held]


def _silent(rng: random.Random, address: Address, detail: Path) -> Held:
    """Connections that say nothing, or nothing more."""
    count = rng.randrange(1, 9)
    detail.write_text(f"{count} connections")
    held: Held = []
    for _ in range(count):
        connection = socket.create_connection(address)
        held.append(connection)
        connection.sendall(rng.randbytes(rng.randrange(63)))
    return held


def _garbage(rng: random.Random, address: Address, detail: Path) -> Held:
    for _ in range(rng.randrange(1, 6)):
        with socket.create_connection(address) as connection:
            connection.sendall(
                rng.choice([b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", rng.randbytes(rng.randrange(3000))])
            )
    return []


def _dripping(rng: random.Random, address: Address, detail: Path) -> Held:
    """A byte now and then, for ever."""
    pid, pause = os.fork(), rng.choice([0.05, 0.5])
    detail.write_text(f"a byte each {pause} s")
    if pid:
        return []
    try:
        connection = socket.create_connection(address)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            connection.sendall(b"x")
            time.sleep(pause)
    finally:
        os._exit(0)


def _nonsense(rng: random.Random, address: Address, detail: Path) -> Held:
    """From one with the key."""
    header = rng.choice(HEADERS)
    detail.write_text(repr(header))
    data = json.dumps(header).encode()
    if rng.random() < 0.2:
        data = rng.choice([b"", b"\xff\xfe", b"[" * 60_000, b'{"kind": "start", "fields": {"version": 1' + b"0" * 5000])
        detail.write_text(repr(data[:60]))
    channel = connect(f"tcp://{address[0]}:{address[1]}", KEY)
    channel._socket.send_multipart(
        [data, *[rng.randbytes(rng.choice([0, 1, 40])) for _ in range(rng.choice([0, 0, 1, 3]))]]
    )
    return [channel]


def _sizes(rng: random.Random, address: Address, detail: Path) -> Held:
    """A command of the handshake whose length is not true."""
    size = rng.choice([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
    detail.write_text(f"size {size}")
    connection = socket.create_connection(address)
    connection.sendall(GREETING + b"\x06" + struct.pack(">Q", size) + b"\x05HELLO" + rng.randbytes(200))
    return [connection]


def _half(rng: random.Random, address: Address, detail: Path) -> Held:
    """A handshake, cut or with one bit wrong."""
    whole = bytearray(GREETING + b"\x04\xc8" + b"\x05HELLO\x01\x00" + bytes(72) + rng.randbytes(120))
    if rng.random() < 0.5:
        whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        detail.write_text("a flipped bit")
    else:
        del whole[rng.randrange(len(whole)) :]
        detail.write_text("cut")
    connection = socket.create_connection(address)
    connection.sendall(bytes(whole))
    if rng.random() < 0.5:
        connection.close()
        return []
    return [connection]


def _resets(rng: random.Random, address: Address, detail: Path) -> Held:
    """RST at a random moment of the handshake."""
    for _ in range(rng.randrange(1, 10)):
        connection = socket.create_connection(address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if rng.random() < 0.5:
            connection.sendall(rng.randbytes(64))
        connection.close()
    return []


ATTACKS: dict[str, Attack] = {
    "silence": _silent,
    "garbage": _garbage,
    "dripping": _dripping,
    "nonsense with the key": _nonsense,
    "wrong sizes": _sizes,
    "half a message": _half,
    "resets": _resets,
}
