"""`vcr1-fast serve`, and trainers that reach its workers by TCP: scripted workers in the place of SGLang."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.rollout.sglang import scripted_worker
from tests.rollout.sglang.conftest import SCRIPTED_WEIGHTS, first_ids, pids, wanted
from vcr1_fast.rollout import serve
from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.serve import Server
from vcr1_fast.rollout.sgl import channel as sglang_channel
from vcr1_fast.rollout.sgl import link as sglang_link
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.settings.config import Config, ConfigError, RolloutConfig
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import RunError, SamplingParams

SAMPLING = SamplingParams(3, 4)
KEY = b"k" * 32
LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def begin_serve(tmp_path, checkpoint, monkeypatch):
    """begin_serve(plan, num_workers): a server on this machine whose workers' starts behave as planned."""
    servers: list[Server] = []
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", KEY.hex())
    monkeypatch.setattr(serve, "POLL_S", 0.02)

    def begin(plan: list[str], num_workers: int = 1, **changes) -> Server:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        settings = SGLangConfig(**{"backoff_s": 0.01, "start_timeout_s": 60.0, **changes})
        gpus = [None] * num_workers
        server = Server(settings, checkpoint, bind=LOOPBACK, gpus=gpus, key=KEY, logs=tmp_path / "logs")
        servers.append(server)
        server.start(60)
        return server

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def begin_trainer(checkpoint, tiny_tokenizer):
    """begin_trainer(server): an engine with weights that uses all workers of the server."""
    engines: list[SGLangEngine] = []

    def begin(server: Server, **changes) -> SGLangEngine:
        addresses = tuple(show(station.address) for station in server.stations)
        settings = {"backoff_s": 0.01, "timeout_s": 30.0, "start_timeout_s": 60.0, **changes}
        config = SGLangConfig(placement="disaggregated", addresses=addresses, **settings)
        engine = SGLangEngine(checkpoint, tiny_tokenizer, config)
        engines.append(engine)
        engine.load_weights(SCRIPTED_WEIGHTS, 1)
        return engine

    yield begin
    for engine in engines:
        engine.close()


def test_two_workers_answer_over_tcp_and_stay_for_the_next_call(begin_serve, begin_trainer, prompts):
    engine = begin_trainer(begin_serve(["ok"], num_workers=2))
    first, second = engine.generate(prompts, SAMPLING), engine.generate(prompts, SAMPLING)
    assert first_ids(first) == first_ids(second) == wanted(prompts)
    assert len(pids(first)) == 2 and pids(first) == pids(second)
    assert engine.num_restarts == 0


def test_a_worker_killed_under_serve_is_replaced(begin_serve, begin_trainer, prompts):
    engine = begin_trainer(begin_serve(["ok"]))
    (pid,) = pids(engine.generate(prompts, SAMPLING))
    os.kill(pid, signal.SIGKILL)
    after = engine.generate(prompts, SAMPLING)
    assert first_ids(after) == wanted(prompts)
    assert pids(after) != {pid}
    assert engine.num_restarts == 1


@pytest.mark.parametrize("how", ["hang", "stopped"])
def test_a_worker_that_hangs_is_ended_and_replaced(begin_serve, begin_trainer, prompts, monkeypatch, how):
    """One whose engine hangs sees its trainer leave; one that is stopped as a whole is found out by serve."""
    monkeypatch.setattr(serve, "SILENCE_S", 0.5)
    server = begin_serve(["hang" if how == "hang" else "ok", "ok"])
    engine = begin_trainer(server, timeout_s=0.5)
    if how == "stopped":
        os.kill(server.stations[0].child.pid, signal.SIGSTOP)
    hung = server.stations[0].child.pid
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    assert engine.num_restarts == 1
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)


def test_a_trainer_that_was_killed_can_start_again(begin_serve, begin_trainer, prompts):
    server = begin_serve(["ok"])
    first = begin_trainer(server)
    (pid,) = pids(first.generate(prompts, SAMPLING))
    first._workers.seats[0].worker.channel.close()  # what the kernel does for a process that is gone
    second = begin_trainer(server)
    answers = second.generate(prompts, SAMPLING)
    assert first_ids(answers) == wanted(prompts)
    assert pids(answers) != {pid}


def test_a_second_trainer_is_told_that_the_worker_is_busy(begin_serve, begin_trainer, prompts):
    server = begin_serve(["ok"])
    engine = begin_trainer(server)
    with pytest.raises(RuntimeError, match=r"did not get ready within 1 s: it serves the trainer 127\.0\.0\.1"):
        begin_trainer(server, start_timeout_s=1.0)
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)


def test_another_key_or_version_is_an_error_at_once(begin_serve, begin_trainer, prompts, monkeypatch):
    server = begin_serve(["ok"])
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", "ab" * 32)
    with pytest.raises(RuntimeError, match="another key"):
        begin_trainer(server)
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", KEY.hex())
    monkeypatch.setattr(sglang_link, "VERSION", "vcr1-fast 0.0.1, messages 1")
    with pytest.raises(RuntimeError, match=r"it is vcr1-fast .* there and vcr1-fast 0\.0\.1, messages 1 here: install"):
        begin_trainer(server)
    monkeypatch.undo()
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", KEY.hex())
    assert first_ids(begin_trainer(server).generate(prompts, SAMPLING)) == wanted(prompts)


def test_strangers_do_no_harm(begin_serve, begin_trainer, prompts):
    """A web browser, one that says nothing, and one that leaves, before and while a trainer is served."""
    server = begin_serve(["ok"])

    def visit() -> list[socket.socket]:
        browser, silent, hasty = (socket.create_connection(server.stations[0].address) for _ in range(3))
        browser.sendall(b"GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: somebody who is curious about ports\r\n\r\n")
        hasty.close()
        return [browser, silent]

    visitors = visit()
    engine = begin_trainer(server)
    visitors += visit()
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    for visitor in visitors:
        visitor.settimeout(0.2)
        told = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := visitor.recv(1000):
                told += part
        assert told[:1] in (b"", b"\xff") and len(told) <= 64  # a greeting of ZMTP at most: nothing else is told
        visitor.close()
    assert engine.num_restarts == 0


HOSTILE = [  # frames of one who has the key, instead of a start
    [b""],
    [b"[" * 100_000],
    [b'{"kind": "start", "fields": {"version": ' + b"9" * 5000 + b'}, "tensors": []}'],
    [b'{"kind": "start", "fields": {"version": "\\ud800\\u001b[31m"}, "tensors": []}'],
    [b'{"kind": "generate", "fields": {}, "tensors": []}'],
]


def test_hostile_messages_of_one_with_the_key_are_answered_and_harm_nobody(begin_serve, begin_trainer, prompts):
    server = begin_serve(["ok"])
    for frames in HOSTILE:
        channel = sglang_channel.connect(server.stations[0].child.address, KEY)
        channel._socket.send_multipart(frames)
        assert channel.receive(5).kind == "unfit"
        channel.close()
    assert first_ids(begin_trainer(server).generate(prompts, SAMPLING)) == wanted(prompts)
    assert server.stations[0].num_workers == 1


def test_garbage_in_the_connection_costs_the_worker_and_not_the_run(begin_serve, begin_trainer, prompts):
    server = begin_serve(["ok"])
    engine = begin_trainer(server)
    engine._workers.seats[0].worker.channel._socket.send(b"no message at all")
    assert first_ids(engine.generate(prompts, SAMPLING)) == wanted(prompts)
    assert engine.num_restarts == 1


def test_nobody_there_and_somebody_else_there_are_told_apart(begin_serve, begin_trainer):
    with socket.create_server(LOOPBACK) as other:
        somewhere = SimpleNamespace(stations=[SimpleNamespace(address=other.getsockname())])

        def greet() -> None:
            for _ in range(sglang_link.MAX_REFUSALS):
                other.accept()[0].sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(RuntimeError, match="another key than we have, or is another program"):
            begin_trainer(somewhere)
        thread.join()
    with pytest.raises(RuntimeError, match="nobody listens there; is `vcr1-fast serve` running there"):
        begin_trainer(somewhere, start_timeout_s=0.5)


def test_a_trainer_may_come_before_serve(begin_serve, begin_trainer, checkpoint, tiny_tokenizer, prompts):
    with socket.create_server(LOOPBACK) as free:
        address = free.getsockname()
    engines: list[SGLangEngine] = []
    early = SimpleNamespace(stations=[SimpleNamespace(address=address)])
    thread = threading.Thread(target=lambda: engines.append(begin_trainer(early)))
    thread.start()
    time.sleep(0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "LOOPBACK", address)
        begin_serve(["ok"])
    thread.join(30)
    assert first_ids(engines[0].generate(prompts, SAMPLING)) == wanted(prompts)


@pytest.mark.parametrize("what", ["taken", "foreign", "too high"])
def test_an_address_that_cannot_be_had_is_named(checkpoint, tmp_path, what):
    with socket.create_server(LOOPBACK) as other:
        address = {"taken": other.getsockname(), "foreign": ("192.0.2.1", 5000), "too high": ("127.0.0.1", 65535)}[what]
        with pytest.raises(ConfigError, match=r"cannot listen at .*choose another --bind"):
            Server(SGLangConfig(), checkpoint, bind=address, gpus=[None] * 2, key=KEY, logs=tmp_path / "logs")


def test_serve_says_why_a_worker_does_not_start(begin_serve):
    with pytest.raises(RuntimeError, match=r"failed to start 2 times in a row(.|\n)*told to crash"):
        begin_serve(["crash"], max_restarts=1)


def test_serve_without_sglang_says_so_at_once(begin_serve):
    with pytest.raises(RunError, match=r"^SGLang cannot be imported by \S+ \(No module .*\): run `make sglang`"):
        begin_serve(["absent"])


def test_a_worker_that_cannot_start_sglang_says_so_to_the_trainer(begin_serve, begin_trainer, prompts):
    server = begin_serve(["unusable", "ok"])
    with pytest.raises(RuntimeError, match="no such model"):
        begin_trainer(server)
    assert first_ids(begin_trainer(server).generate(prompts, SAMPLING)) == wanted(prompts)


def test_the_command_prints_where_it_serves_and_leaves_nothing(tmp_path):
    """The real command and a real interpreter; the key is made, mode 600. Ctrl-C ends it."""
    python, script = tmp_path / "python", Path(scripted_worker.__file__)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$3" "$4"\n')
    python.chmod(stat.S_IRWXU)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "plan.json").write_text('["ok"]')
    key_file = tmp_path / "secret" / "rollout.key"
    environment = {**os.environ, "SCRIPTED_WORKER_FOLDER": str(tmp_path), "TMPDIR": str(temporary)}
    environment.pop("VCR1_ROLLOUT_KEY", None)
    command = [sys.executable, "-m", "vcr1_fast", "serve", "--bind=127.0.0.1:0", f"--logs={tmp_path / 'logs'}"]
    command += [f"--rollout.sglang.python={python}", f"--rollout.sglang.key_file={key_file}", "--model.device=cpu"]
    served = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert served.stdout is not None
    try:
        told = ""
        while "waiting for trainers" not in told:
            line = served.stdout.readline()
            assert line, f"it ended: {told}"
            told += line
        assert "scripted" in told and str(key_file) in told and "--rollout.sglang.addresses='[\"127.0.0.1:" in told
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600 and len(bytes.fromhex(key_file.read_text())) == 32
        assert (tmp_path / "logs" / "worker-0.log").exists()
        workers = children(served.pid)
        assert workers
        served.send_signal(signal.SIGINT)
        assert served.wait(30) == 0
    finally:
        served.kill()
        served.stdout.close()
    assert list(temporary.iterdir()) == []
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


@pytest.mark.parametrize(
    ("num_workers", "tp_size", "gpus"), [(None, 1, [0, 1, 2, 3]), (None, 2, [0, 2]), (1, 2, [0]), (None, 3, [0])]
)
def test_each_worker_gets_its_own_gpus(monkeypatch, num_workers, tp_size, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sglang = SGLangConfig(placement="disaggregated", tp_size=tp_size)
    config = Config(rollout=RolloutConfig(engine="sglang", sglang=sglang))
    assert serve._gpus(config, num_workers) == gpus
    with pytest.raises(ConfigError, match=f"wanted at most {4 // tp_size} workers"):
        serve._gpus(config, 5)
    with pytest.raises(ConfigError, match="placement colocated"):
        SGLangConfig(tp_size=2)
