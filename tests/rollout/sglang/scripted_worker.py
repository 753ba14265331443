"""A worker that speaks the messages without SGLang and fails as told, for test_supervision.py and test_serve.py.

`plan.json` in SCRIPTED_WORKER_FOLDER says how each start behaves, the last one for all further starts:
    ok          answers at once: two tokens per completion, the policy version and the process id
    die N       ends at its N-th request
    hang        takes requests and says nothing more
    fail        says that a request failed
    refuse      refuses a request
    unusable    does not start
    crash       ends before it can be reached
    absent      is the real worker, in an interpreter without SGLang
    silent      can never be reached
    wrong       holds other weights than it was sent
    deaf        takes weights and says nothing
    hold        keeps its first requests until it is interrupted: then each has one finished completion, and of the
                others the first token
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from vcr1_fast.rollout.sgl import worker
from vcr1_fast.rollout.sgl.endpoint import KEY_VARIABLE, STATUS_VARIABLE, Endpoint
from vcr1_fast.rollout.sgl.messages import Message

LIMITS = {
    "vocabulary_size": 288,
    "video_token_id": 263,
    "hidden_size": 64,
    "context_length": 4096,
    "num_cache_tokens": 4096,
    "num_gpus": 1,
}


def behaviour(folder: Path) -> str:
    """Of this start; starts are counted in a file, by all workers of a test together."""
    plan = json.loads((folder / "plan.json").read_text())
    with (folder / "starts").open("a+") as starts:
        starts.write(".")
        starts.flush()
        starts.seek(0)
        count = len(starts.read())
    return plan[min(count, len(plan)) - 1]


def main(address: str, own_args: str) -> None:
    how = behaviour(Path(os.environ["SCRIPTED_WORKER_FOLDER"]))
    if how == "crash":
        sys.exit("this worker was told to crash")
    if how == "silent":
        time.sleep(3600)
    if how == "absent":
        sys.argv[1:] = [address, own_args]
        sys.exit(worker.main())
    endpoint = Endpoint(address, bytes.fromhex(os.environ[KEY_VARIABLE]), Path(os.environ[STATUS_VARIABLE]))
    endpoint.tell({"sglang": "scripted", "torch": torch.__version__, "gpu": "none"})
    try:
        assert endpoint.receive().kind == "start"
        if how == "unusable":
            endpoint.send("unusable", {"reason": "no such model"})
        else:
            work(endpoint, how)
    except EOFError:
        pass
    endpoint.close()


def work(endpoint: Endpoint, how: str) -> None:
    libraries = {"torch": "2.11.0+cu129", "cuda": "12.9", "nccl": "2.28.9"}
    endpoint.send("ready", {"limits": LIMITS, "version": "scripted", "libraries": libraries})
    version, num_requests = -1, 0
    held: list[Message] = []
    is_holding = how == "hold"
    while True:
        message = endpoint.receive()
        if message.kind == "close":
            return
        if message.kind == "weights":
            if how == "deaf":
                continue
            version = message.fields["policy_version"] if message.fields["is_last"] else -1
            wrong = ["'w' does not stand where it should"] if how == "wrong" and message.fields["check"] else []
            endpoint.send("loaded", {"id": message.fields["id"], "wrong": wrong})
        elif message.kind == "interrupt":
            is_holding = False
            for request in held:
                cut_short(endpoint, request, version)
        elif message.kind == "generate" and is_holding:
            held.append(message)
        elif message.kind == "generate":
            num_requests += 1
            if how.startswith("die") and num_requests == int(how.split()[1]):
                os._exit(1)
            answer(endpoint, message, how, version)


def cut_short(endpoint: Endpoint, message: Message, version: int) -> None:
    fields, first = message.fields, int(message.tensors["token_ids_L"][0])
    count = len(fields["begun_lengths"])
    reply = {
        "id": fields["id"],
        "lengths": [2, *[1] * (count - 1)],
        "policy_versions": [str(version)] * count,
        "is_cut": [False, *[True] * (count - 1)],
    }
    tokens = torch.tensor([first, fields["stop_ids"][0], *[first] * (count - 1)])
    endpoint.send("completions", reply, {"token_ids": tokens, "logprobs": torch.full((count + 1,), -0.5)})


def answer(endpoint: Endpoint, message: Message, how: str, version: int) -> None:
    number, fields = message.fields["id"], message.fields
    if how in ("fail", "refuse"):
        kind = {"fail": "failed", "refuse": "refused"}[how]
        endpoint.send(kind, {"id": number, "reason": "it was told to"})
    if how in ("hang", "fail", "refuse"):
        return
    assert fields["policy_version"] == version, "asked before it had these weights"
    count = len(fields["begun_lengths"])
    tokens = torch.tensor([int(message.tensors["token_ids_L"][0]), fields["stop_ids"][0]] * count)
    logprobs = torch.full((2 * count,), -float(os.getpid()))
    reply = {
        "id": number,
        "lengths": [2] * count,
        "policy_versions": [str(version)] * count,
        "is_cut": [False] * count,
    }
    endpoint.send("completions", reply, {"token_ids": tokens, "logprobs": logprobs})


if __name__ == "__main__":
    main(*sys.argv[1:])
