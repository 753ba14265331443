"""`python -m vcr1_fast.rollout.sglang_worker SOCKET`: one `sglang.Engine`, driven by messages (sglang_messages.py).

Runs in the interpreter that has SGLang, which pins its own torch and transformers: imports here stay with the standard
library, torch and SGLang. Started, fed and restarted by sglang_process.py.

    trainer -> worker                                    worker -> trainer
    start {engine_args}                                  ready {limits, version} or unusable {reason}
    generate {id, ...} + ids, positions, patches         completions | refused | failed | aborted, with the id
    abort {id}                                           aborted {id}
    weights {id, ...} + one bucket                       loaded {id} | failed {id}
    close

The end of the connection ends the worker. SGLang ends this process itself when one of its own processes dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sglang_messages import KEY_VARIABLE, Channel, Message, connect
from vcr1_fast.rollout.sglang_video import check_request, completion_tensors, sampling_params, video_item

CHECK_LOADER = "vcr1_fast.rollout.sglang_check.compare"
START_WAIT_S = 60.0
PARENT_POLL_S = 2.0


def main() -> int:
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    channel = connect(sys.argv[1], bytes.fromhex(os.environ.pop(KEY_VARIABLE)))
    start = channel.receive(START_WAIT_S)
    try:
        worker = Worker(channel, start.fields["engine_args"])
    except Exception as error:
        traceback.print_exc()
        channel.send("unusable", {"reason": f"{type(error).__name__}: {error}"})
        return 1
    worker.run()
    return 0


class Worker:
    """Requests run side by side in SGLang's event loop; a thread reads the socket, so that nobody who sends waits."""

    def __init__(self, channel: Channel, engine_args: Mapping[str, Any]) -> None:
        # Weights reach SGLang's process as torch shared memory. With torch's other strategy, descriptors, that process
        # died of an authentication error (0.5.17 to 0.5.23).
        torch.multiprocessing.set_sharing_strategy("file_system")
        import sglang  # pyright: ignore[reportMissingImports]

        self._channel = channel
        self._engine: Any = sglang.Engine(**engine_args)
        self._device = str(engine_args["device"])
        self._version = str(sglang.__version__)
        self._policy_version = -1  # no weights yet
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._closed = asyncio.Event()
        config = self._engine.tokenizer_manager.model_config
        self._limits = {
            "vocabulary_size": int(config.vocab_size),
            "video_token_id": int(config.hf_config.video_token_id),
            "hidden_size": int(config.hidden_size),
            "context_length": int(config.context_len),
            "num_cache_tokens": int(self._engine.get_server_info()["max_total_num_tokens"]),
        }

    def run(self) -> None:
        """Until the trainer closes the connection."""
        loop: asyncio.AbstractEventLoop = self._engine.loop
        self._channel.send("ready", {"limits": self._limits, "version": self._version, "pid": os.getpid()})
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        loop.run_until_complete(self._closed.wait())
        self._engine.shutdown()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                loop.call_soon_threadsafe(self._begin, self._channel.receive())
        except (EOFError, OSError):
            loop.call_soon_threadsafe(self._closed.set)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # after bytes that are no message nothing can be answered; the trainer starts another worker

    def _begin(self, message: Message) -> None:
        if message.kind == "close":
            self._closed.set()
            return
        number = int(message.fields["id"])
        if message.kind == "abort":
            task = self._tasks.get(number)
            if task is not None:  # cancelled, SGLang drops what it has of the group
                task.cancel()
            return
        task = asyncio.get_event_loop().create_task(self._answer(number, message))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, message: Message) -> None:
        tensors: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        try:
            if message.kind == "generate":
                kind = "completions"
                fields, tensors = await self._generate(message)
            else:
                kind = "loaded"
                fields = await self._load(message)
        except asyncio.CancelledError:
            kind = "aborted"
        except ValueError as error:
            kind, fields = "refused", {"reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            kind, fields = "failed", {"reason": f"{type(error).__name__}: {error}"}
        self._channel.send(kind, {"id": number, **fields}, tensors)

    async def _generate(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields, tensors = message.fields, message.tensors
        if fields["policy_version"] != self._policy_version:
            raise RuntimeError(f"the engine has policy {self._policy_version}, wanted {fields['policy_version']}")
        check_request(fields, tensors, self._limits)
        answers = await self._engine.async_generate(
            input_ids=tensors["token_ids_L"].tolist(),
            sampling_params=sampling_params(fields),
            video_data=[video_item(fields, tensors, self._policy_version)],
            return_logprob=True,
            logprob_start_len=-1,
            token_ids_logprob=list(fields["suppressed_ids"]),
        )
        metas = [answer["meta_info"] for answer in ([answers] if isinstance(answers, dict) else answers)]
        if any(meta["finish_reason"]["type"] == "abort" for meta in metas):
            raise RuntimeError(f"SGLang gave a completion up: {metas[0]['finish_reason']}")
        rows = [completion_tensors(meta) for meta in metas]
        reply = {
            "lengths": [int(token_R.numel()) for token_R, _ in rows],
            "policy_versions": [str(meta["weight_version"]) for meta in metas],
            "num_cached_tokens": [int(meta.get("cached_tokens", 0)) for meta in metas],
        }
        return reply, {"token_ids": torch.cat([r[0] for r in rows]), "logprobs": torch.cat([r[1] for r in rows])}

    async def _load(self, message: Message) -> dict[str, Any]:
        """One bucket. The first opens SGLang's update session where it has one, the last ends it and sets the version.

        Gives what the comparison found wrong, if `check` asks for one: every weight of the bucket is then read back.
        """
        fields, flat_B = message.fields, message.tensors["bytes_B"]
        self._policy_version = -1  # until the last bucket is in
        flat_B = flat_B.to(self._device)
        if fields["is_first"]:
            await self._session("begin_weight_update", "BeginWeightUpdateReqInput")
        entries = fields["entries"]
        version = str(fields["policy_version"]) if fields["is_last"] else None
        bucket = {"flattened_tensor": flat_B, "metadata": [_metadata(entry) for entry in entries]}
        await self._update(bucket, "flattened_bucket", is_last=bool(fields["is_last"]), version=version)
        wrong: list[str] = []
        if fields["check"]:
            wrong = await self._compare(flat_B, entries, fields)
        if fields["is_last"]:
            await self._session("end_weight_update", "EndWeightUpdateReqInput")
            self._policy_version = int(fields["policy_version"])
        return {"wrong": wrong}

    async def _compare(self, flat_B: Tensor, entries: list[dict[str, Any]], fields: Mapping[str, Any]) -> list[str]:
        """Has sglang_check.compare read the bucket's weights back, inside SGLang's process; what it found wrong."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            named = [(entry["name"], _view(flat_B, entry)) for entry in entries]
            order = {"path": str(report), "is_first": fields["is_first"], "is_last": fields["is_last"]}
            named.append(("", torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)))
            await self._update(named, CHECK_LOADER, is_last=False, version=None)
            return json.loads(report.read_text(encoding="utf-8"))

    async def _update(self, payload: object, load_format: str, *, is_last: bool, version: str | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput  # pyright: ignore[reportMissingImports]
        from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore[reportMissingImports]

        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize(payload)],
            load_format=load_format,
            flush_cache=is_last,
            weight_version=version,
        )
        _require(await self._engine.tokenizer_manager.update_weights_from_tensor(request, None))

    async def _session(self, method: str, request: str) -> None:
        """Versions before 0.5.18 take weights without a session and have neither."""
        from sglang.srt.managers import io_struct  # pyright: ignore[reportMissingImports]

        manager = self._engine.tokenizer_manager
        if hasattr(manager, method):
            _require(await getattr(manager, method)(getattr(io_struct, request)(), None))


def _follow(parent: int) -> None:
    """End this process and SGLang's, all of one group, when the trainer is gone: also in the middle of the start."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    if os.getpgrp() == os.getpid():  # as sglang_process.py starts it
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _require(outcome: tuple[bool, str]) -> None:
    if not outcome[0]:
        raise RuntimeError(outcome[1])


def _metadata(entry: Mapping[str, Any]) -> object:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata  # pyright: ignore[reportMissingImports]

    start, stop = int(entry["start"]), int(entry["stop"])
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return FlattenedTensorMetadata(entry["name"], torch.Size(entry["shape"]), dtype, start, stop, stop - start)


def _view(flat_B: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return flat_B[entry["start"] : entry["stop"]].view(dtype).reshape(entry["shape"])


if __name__ == "__main__":
    sys.exit(main())
