"""`python -m vcr1_fast.rollout.sgl.worker ADDRESS ARGS`: one `sglang.Engine`, driven by messages (messages.py).

Runs in the interpreter that has SGLang, which pins its own torch and transformers: imports here stay with the standard
library, torch, pyzmq and SGLang. Started by process.py, for the trainer itself or for `vcr1-fast serve`; a trainer
connects to its address (endpoint.py).

    trainer -> worker                                    worker -> trainer
    start {version, engine_args}                         starting, then ready {limits, version, libraries} or
                                                         unusable {reason}
    generate {id, media, ...} + ids, positions, patches  completions | refused | failed | aborted, with the id
    abort {id}                                           aborted {id}
    interrupt                                            completions of all requests, as far as they are
    weights {id, ...} + one bucket, or where it is       loaded {id, wrong} | failed {id}
    group {id, ...}, memory {id, action, tags}           loaded {id} | failed {id}
    close

The end of the trainer's connection, or of the process that started it, ends the worker. SGLang ends this process itself
when one of its own processes dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.endpoint import KEY_VARIABLE, NO_SGLANG, STATUS_VARIABLE, Endpoint
from vcr1_fast.rollout.sgl.features import SharedFeatures
from vcr1_fast.rollout.sgl.group import Libraries
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.update import Updater, engine_arguments
from vcr1_fast.rollout.sgl.video import (
    check_request,
    completion_tensors,
    features_by_kind,
    requests_of,
)
from vcr1_fast.video.pixel_bytes import unpack

END_LIMIT_S = 30.0
CUT_POLL_S = 0.1
UNREAD_S = 60.0  # that a request given up may lie in SGLang's queue: it reads after each step


def main() -> int:
    key, status = bytes.fromhex(os.environ.pop(KEY_VARIABLE)), Path(os.environ.pop(STATUS_VARIABLE))
    endpoint = Endpoint(sys.argv[1], key, status, when_over=_end_group)
    own_args: Mapping[str, Any] = json.loads(sys.argv[2])  # what only this node knows
    try:
        endpoint.tell(_facts(own_args))
        start = endpoint.receive()
        Worker(endpoint, {**start.fields["engine_args"], **own_args}).run()
    except _AbsentError as error:
        print(error, file=sys.stderr)
        return NO_SGLANG
    except Exception as error:
        traceback.print_exc()
        endpoint.send("unusable", {"reason": f"{type(error).__name__}: {error}"})
        return 1
    finally:
        _limit_the_end()
        endpoint.close()
    return 0


class _AbsentError(Exception):
    """There is no SGLang."""


def _facts(own_args: Mapping[str, Any]) -> dict[str, str]:
    """What `vcr1-fast serve` tells of this worker. Imports SGLang."""
    try:
        import sglang  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _AbsentError(
            f"SGLang cannot be imported by {sys.executable} ({error}): run `make sglang`, and set "
            "rollout.sglang.python to the interpreter that has it"
        ) from None
    gpu = own_args.get("base_gpu_id")
    name = "none" if gpu is None else torch.cuda.get_device_name(gpu)
    return {"sglang": str(sglang.__version__), "torch": torch.__version__, "gpu": name}


class Worker:
    """Requests run side by side in SGLang's event loop."""

    def __init__(self, endpoint: Endpoint, engine_args: Mapping[str, Any]) -> None:
        # Weights reach SGLang's process as torch shared memory. With torch's other strategy, descriptors, that process
        # died of an authentication error (0.5.17 to 0.5.23).
        torch.multiprocessing.set_sharing_strategy("file_system")
        import sglang  # pyright: ignore[reportMissingImports]

        self._endpoint = endpoint
        self._engine: Any = sglang.Engine(**engine_arguments(engine_args))
        num_gpus = int(self._engine.server_args.tp_size)
        self._updater = Updater(self._engine.tokenizer_manager, num_gpus)
        self._version = str(sglang.__version__)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._drawing: set[int] = set()  # requests that SGLang works on
        self._cut: set[int] = set()  # those among them that were told to end
        self._closed = asyncio.Event()
        config = self._engine.tokenizer_manager.model_config
        model, tower = config.hf_config, config.hf_config.vision_config
        num_inner = len(getattr(tower, "deepstack_visual_indexes", ()))  # Qwen3-VL's features for inner layers
        self._limits = {
            "vocabulary_size": int(config.vocab_size),
            "video_token_id": int(model.video_token_id),
            "image_token_id": int(model.image_token_id),
            "patch_values": int(tower.in_channels * tower.temporal_patch_size * tower.patch_size**2),
            "feature_width": int(config.hidden_size) * (1 + num_inner),
            "context_length": int(config.context_len),
            "num_gpus": num_gpus,
            "num_cache_tokens": int(self._engine.get_server_info()["max_total_num_tokens"]),
        }

    def run(self) -> None:
        """Until the trainer says that it closes."""
        loop: asyncio.AbstractEventLoop = self._engine.loop
        facts = {"limits": self._limits, "version": self._version, "libraries": asdict(Libraries.here())}
        self._endpoint.send("ready", facts)
        self._endpoint.attach(loop, self._begin)
        loop.run_until_complete(self._closed.wait())
        _limit_the_end()
        self._engine.shutdown()

    def _begin(self, message: Message) -> None:
        loop: asyncio.AbstractEventLoop = self._engine.loop
        if message.kind == "close":
            self._closed.set()
            return
        if message.kind == "interrupt":
            self._cutting = loop.create_task(self._cut_short(set(self._drawing)))
            return
        number = int(message.fields["id"])
        if message.kind == "abort":
            if number in self._tasks:  # cancelled, SGLang drops what it has of the group
                self._tasks[number].cancel()
            return
        if message.kind == "generate":
            self._drawing.add(number)
        self._tasks[number] = task = loop.create_task(self._answer(number, message))
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _cut_short(self, numbers: set[int]) -> None:
        """End these requests, which are all there are, with what they have. Again and again: of n completions SGLang
        begins with one that has no tokens, and makes the others only when that is done."""
        self._cut |= numbers
        while numbers & self._drawing:
            self._engine.tokenizer_manager.abort_request(abort_all=True)
            await asyncio.sleep(CUT_POLL_S)
        self._cut -= numbers

    async def _answer(self, number: int, message: Message) -> None:
        tensors: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        try:
            if message.kind == "generate":
                kind = "completions"
                fields, tensors = await self._generate(message)
            else:
                kind = "loaded"
                update = {"weights": self._updater.load, "group": self._updater.join, "memory": self._updater.memory}
                fields = await update[message.kind](message)
        except asyncio.CancelledError:
            kind = "aborted"
        except ValueError as error:
            kind, fields = "refused", {"reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            kind, fields = "failed", {"reason": f"{type(error).__name__}: {error}"}
        self._drawing.discard(number)
        self._endpoint.send(kind, {"id": number, **fields}, tensors)

    async def _generate(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = message.fields
        if fields["policy_version"] != self._updater.policy_version:
            raise RuntimeError(
                f"the engine has policy {self._updater.policy_version}, wanted {fields['policy_version']}"
            )
        # In a thread: it passes over all pixels, and others go on
        features, requests = await asyncio.to_thread(self._prepared, message)
        close_after_s, draw = UNREAD_S, self._engine.async_generate
        try:
            if len(requests) > 1:
                await draw(**requests.pop(0))
            answers = await asyncio.gather(*(draw(**request) for request in requests))
            close_after_s = 0.0
        finally:
            for shared in features:
                asyncio.get_running_loop().call_later(close_after_s, shared.close)
        flat = [one for answer in answers for one in (answer if isinstance(answer, list) else [answer])]
        metas = [answer["meta_info"] for answer in flat]
        is_cut = [meta["finish_reason"]["type"] == "abort" for meta in metas]
        if any(is_cut) and fields["id"] not in self._cut:
            raise RuntimeError(f"SGLang gave a completion up: {metas[is_cut.index(True)]['finish_reason']}")
        rows = [completion_tensors(meta) for meta in metas]
        reply = {
            "lengths": [int(token_R.numel()) for token_R, _ in rows],
            "policy_versions": [
                str(meta["weight_version"]) for meta, (token_R, _) in zip(metas, rows, strict=True) if token_R.numel()
            ],
            "is_cut": is_cut,
        }
        return reply, {"token_ids": torch.cat([r[0] for r in rows]), "logprobs": torch.cat([r[1] for r in rows])}

    def _prepared(self, message: Message) -> tuple[list[SharedFeatures], list[dict[str, Any]]]:
        """What of the message is handed on by reference, and SGLang's form of it."""
        fields, tensors = message.fields, unpack(message.tensors)
        check_request(fields, tensors, self._limits)
        features = {k: SharedFeatures.share(rows) for k, rows in features_by_kind(fields["media"], tensors).items()}
        return list(features.values()), requests_of(fields, tensors, features)


def _limit_the_end() -> None:
    """SGLang's shutdown may hang; under `vcr1-fast serve` the next trainer would wait for it."""
    limit = threading.Timer(END_LIMIT_S, os._exit, (1,))
    limit.daemon = True
    limit.start()


def _end_group() -> None:
    """This process and SGLang's, now, also in the middle of a start."""
    if os.getpgrp() == os.getpid():  # as process.py starts it
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
